//! A hash of a set that follows its changes: LtHash16, 1,024 lanes of 16 bits over BLAKE3.
//!
//! Elements are added and taken away lane by lane. To find another set with the same lanes is a short-vector problem in a
//! lattice; a plain 256-bit sum would fall to the generalized birthday attack. What is signed is BLAKE3 of the lanes.

const LANES: usize = 1024;

#[derive(Clone, PartialEq, Eq)]
pub struct LtHash(Box<[u16; LANES]>);

impl Default for LtHash {
    fn default() -> Self {
        Self(Box::new([0; LANES]))
    }
}

impl LtHash {
    pub fn add(&mut self, element: &[u8]) {
        for (lane, add) in self.0.iter_mut().zip(lanes(element).iter()) {
            *lane = lane.wrapping_add(*add);
        }
    }

    pub fn remove(&mut self, element: &[u8]) {
        for (lane, take) in self.0.iter_mut().zip(lanes(element).iter()) {
            *lane = lane.wrapping_sub(*take);
        }
    }

    pub fn digest(&self) -> [u8; 32] {
        let mut bytes = [0; LANES * 2];
        for (lane, out) in self.0.iter().zip(bytes.chunks_exact_mut(2)) {
            out.copy_from_slice(&lane.to_le_bytes());
        }
        *blake3::hash(&bytes).as_bytes()
    }
}

fn lanes(element: &[u8]) -> [u16; LANES] {
    let mut bytes = [0; LANES * 2];
    let mut hasher = blake3::Hasher::new_derive_key("dunlin gossip 1 element");
    hasher.update(element).finalize_xof().fill(&mut bytes);
    let mut lanes = [0; LANES];
    for (lane, pair) in lanes.iter_mut().zip(bytes.chunks_exact(2)) {
        *lane = u16::from_le_bytes([pair[0], pair[1]]);
    }
    lanes
}
