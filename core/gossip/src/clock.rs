//! A host's clock: what its system says, but never less than it has said before, also across restarts.

/// Two readings by the caller. Timers and ages use the first, which nothing sets; what is published uses the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Since any fixed moment of this process; never goes back.
    pub ms: u64,
    /// Since 1970, by the system; may jump.
    pub wall_ms: u64,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    said_ms: u64,
    at: Now,
}

impl Clock {
    pub fn start(persisted_ms: u64, now: Now) -> Self {
        Self { said_ms: persisted_ms.max(now.wall_ms), at: now }
    }

    /// Goes on at the pace of real time where the system's clock was set back.
    pub fn read(&mut self, now: Now) -> u64 {
        let passed = now.ms.saturating_sub(self.at.ms);
        self.said_ms = (self.said_ms + passed).max(now.wall_ms);
        self.at = Now { ms: now.ms.max(self.at.ms), wall_ms: now.wall_ms };
        self.said_ms
    }
}
