//! The one source of chance, from the caller's seed: SplitMix64. It chooses peers and spreads times; no secret hangs on it.

use rand_core::TryRng;
use std::convert::Infallible;

#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `n` - 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.draw() % n.max(1) as u64) as usize
    }

    /// `ms`, give or take a quarter.
    pub fn around(&mut self, ms: u64) -> u64 {
        ms - ms / 4 + self.draw() % (ms / 2).max(1)
    }

    /// `count` different places of `n`.
    pub fn choose(&mut self, count: usize, n: usize) -> Vec<usize> {
        let mut chosen: Vec<usize> = Vec::with_capacity(count.min(n));
        if count >= n {
            return (0..n).collect();
        }
        while chosen.len() < count {
            let place = self.below(n);
            if !chosen.contains(&place) {
                chosen.push(place);
            }
        }
        chosen
    }
}

impl TryRng for Rng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.draw() as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.draw())
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.draw().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}
