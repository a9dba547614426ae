//! From the head of a request to a decision: which machine takes it, which is woken for it, whether it
//! waits, or why it is refused.
//!
//! ```text
//! Snapshot, Vantage --build--> Table (immutable, swapped whole) --route(&Head, tried, random, now)--> Decision
//!                        |
//!                     Loads (one counter a machine; outlives every swap)
//! ```
//!
//! Owns the route table and the counters beside it. Never does IO, never reads a clock or a random
//! source. A [`Ticket`] is a reservation: while it lives, the machine's load counts it, so a hard limit
//! holds however many threads route at once. Tested by unit and property tests.
#![forbid(unsafe_code)]

mod decision;
mod host;
mod load;
mod pick;
mod table;

pub use decision::{Decision, Detail, Head, Reject, WaitReason};
pub use host::host_name;
pub use load::{AppLoad, Load, Loads, Ticket};
pub use table::{Availability, Candidate, Far, Route, Table, Vantage};
