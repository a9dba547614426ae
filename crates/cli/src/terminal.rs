//! The terminal that a person sits at, and the signals that come to us.

use crate::CliError;
use dunlin_api::WindowSize;
use std::io::IsTerminal;

/// Whether somebody both types and reads here.
pub fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// A signal that came to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Interrupt,
    Terminate,
    Hangup,
    Resized,
}

/// Where nothing says how large it is.
const USUAL: WindowSize = WindowSize { rows: 24, columns: 80 };

#[cfg(unix)]
pub use unix::*;

#[cfg(unix)]
mod unix {
    use super::*;
    use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
    use std::io::{stdin, stdout};
    use tokio::signal::unix::{Signal, SignalKind, signal};

    pub fn size() -> WindowSize {
        match tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin())) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => WindowSize { rows: size.ws_row, columns: size.ws_col },
            _ => USUAL,
        }
    }

    /// Every key goes to the machine as it is; dropping it gives the terminal back as it was, in a panic too.
    pub struct Raw(Termios);

    impl Raw {
        pub fn enter() -> Result<Self, CliError> {
            let failed = |e| CliError::failed(format!("the terminal cannot be made raw: {e}")).hint("try --no-tty");
            let before = tcgetattr(stdin()).map_err(failed)?;
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(stdin(), OptionalActions::Now, &raw).map_err(failed)?;
            Ok(Self(before))
        }
    }

    impl Drop for Raw {
        fn drop(&mut self) {
            let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0); // it may be gone
        }
    }

    pub struct Signals {
        interrupt: Signal,
        terminate: Signal,
        hangup: Signal,
        resized: Signal,
    }

    impl Signals {
        pub fn new() -> Result<Self, CliError> {
            let listen = |kind| signal(kind).map_err(|e| CliError::failed(format!("signals cannot be heard: {e}")));
            Ok(Self {
                interrupt: listen(SignalKind::interrupt())?,
                terminate: listen(SignalKind::terminate())?,
                hangup: listen(SignalKind::hangup())?,
                resized: listen(SignalKind::window_change())?,
            })
        }

        pub async fn next(&mut self) -> Heard {
            tokio::select! {
                _ = self.interrupt.recv() => Heard::Interrupt,
                _ = self.terminate.recv() => Heard::Terminate,
                _ = self.hangup.recv() => Heard::Hangup,
                _ = self.resized.recv() => Heard::Resized,
            }
        }
    }
}

#[cfg(not(unix))]
pub use elsewhere::*;

#[cfg(not(unix))]
mod elsewhere {
    use super::*;

    pub fn size() -> WindowSize {
        USUAL
    }

    pub struct Raw;

    impl Raw {
        pub fn enter() -> Result<Self, CliError> {
            Err(CliError::failed("terminals of this system cannot be used yet").hint("add --no-tty, or name a command with -C"))
        }
    }

    pub struct Signals;

    impl Signals {
        pub fn new() -> Result<Self, CliError> {
            Ok(Self)
        }

        pub async fn next(&mut self) -> Heard {
            match tokio::signal::ctrl_c().await {
                Ok(()) => Heard::Interrupt,
                Err(_) => std::future::pending().await, // none can be heard
            }
        }
    }
}
