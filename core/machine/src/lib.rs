//! One machine's life on its host: an event and the time go in, effects come out.
//!
//! ```text
//!            prepared            start               exit, stop asked
//! creating ----------> created ---------> starting -> started -> stopping -> stopped
//!     |                   ^                  ^            |                     |
//!     | cannot be         | update of        | back-off   | exit, to be         | start
//!     v prepared          | one asleep       |            v restarted           |
//!   failed <------------------------------ restarting <---+     updating (stop, swap, start)
//!
//! started -> suspending -> suspended -> started (start), stopped (stop, a boot of the host)
//!
//! an exclusive one after a boot of its host: restarting, if it is to run, until its placement is confirmed or a start comes
//!
//! a version that rests, prepared while another runs: stopping -> stopped, without a start
//!
//! any state, tombstone: destroying -> destroyed
//! stopped or failed, with auto_destroy: over, until a tombstone or a new version comes
//! created, stopped, failed or suspended, with a schedule: started when its time has come
//! ```
//!
//! Owns the [`Record`] that the host journals, and the order of effects: [`Effect::Journal`] always
//! comes before the acts that it allows, so a crash between two effects is recovered by
//! [`Event::Recovered`], which says what is really alive. Never does anything itself. Tested by
//! scenarios and by random histories with a crash after any effect.
#![forbid(unsafe_code)]

mod command;
mod event;
mod idle;
mod life;
mod record;

pub use command::{Asked, Checked, Deny, MAX_REMEMBERED, Order, Verb};
pub use event::{Alive, Effect, Event};
pub use idle::{Running, one_too_many};
pub use life::{Machine, UNCONFIRMED, backoff_ms};
pub use record::{Goal, MAX_EVENTS, Record, Stop};
