//! Chance for property tests, which a seed brings back.

use std::collections::BTreeSet;

/// xorshift: a seed gives the same order again.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap()
    }

    pub fn pick<T: Clone>(&mut self, from: &BTreeSet<T>) -> Option<T> {
        let index = self.below(from.len().max(1));
        from.iter().nth(index).cloned()
    }
}
