//! How far the prefetcher lets the kernel read ahead.
//!
//! A device is fast with much to read at a time, and a fault waits for what is being read before
//! its page. The distance therefore grows while no fault comes, and is halved when one does.

/// The distance at first, and the longest one, in pieces.
const FIRST: u64 = 4;
const LONGEST: u64 = 16;

/// The distance of the read-ahead advice.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    /// Bytes that are read at a time.
    piece: u64,
    /// The distance in pieces.
    pieces: u64,
    /// The number of faults before the last piece.
    faults: u64,
}

impl ReadAhead {
    /// Returns the distance for pieces of this size.
    pub(crate) fn new(piece: u64) -> Self {
        Self {
            piece,
            pieces: FIRST,
            faults: 0,
        }
    }

    /// Returns the distance in bytes after the next piece. `faults` is the number of faults so far.
    pub(crate) fn next(&mut self, faults: u64) -> u64 {
        self.pieces = match std::mem::replace(&mut self.faults, faults) == faults {
            true => LONGEST.min(self.pieces + 1),
            false => (self.pieces / 2).max(1),
        };
        self.pieces * self.piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_halved_by_faults_and_grows_without() {
        let mut ahead = ReadAhead::new(10);
        let distances: Vec<_> = [0, 0, 5, 6, 7, 7, 7]
            .map(|faults| ahead.next(faults))
            .into();
        assert_eq!(distances, [50, 60, 30, 10, 10, 20, 30]);
        assert_eq!((0..100).map(|_| ahead.next(7)).last(), Some(160));
    }
}
