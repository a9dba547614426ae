//! Chance that can be repeated.

/// xorshift, seeded by the clock and printed, so that a failure can be run again.
pub struct Random(pub u64);

impl Random {
    pub fn seeded() -> Self {
        let seed = std::env::var("DUNLIN_TEST_SEED").ok().and_then(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok());
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        Self(seed.unwrap_or(clock) | 1)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}
