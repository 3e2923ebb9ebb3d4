//! What is known of a block, and the plan for its faults.

/// The number of parts of a block. A sample is one of them.
pub(super) const SAMPLE_PARTS: u32 = 16;
/// The number of consecutive checkpoints at which unprotecting the whole block was cheaper, after
/// which a single fault unprotects it.
const MAX_CONFIDENCE: u8 = 4;
/// The number of checkpoints from one sample to the next, at maximum confidence.
const SAMPLE_INTERVAL: u8 = 8;

/// The events in a block since the last checkpoint.
///
/// The low 24 bits count the faults on single pages, the next 24 bits those among them that were in
/// the sample.
#[derive(Clone, Copy, Debug)]
pub(super) struct Activity(pub(super) u64);

impl Activity {
    pub(super) const FAULT: u64 = 1;
    pub(super) const SAMPLE_FAULT: u64 = 1 << 24;
    /// The block was unprotected as a whole, with or without a sample.
    pub(super) const UNPROTECTED: u64 = 1 << 62;
    /// A sample stayed protected.
    pub(super) const SAMPLED: u64 = 1 << 63;

    pub(super) fn faults(self) -> u32 {
        (self.0 & 0xff_ffff) as u32
    }

    pub(super) fn sample_faults(self) -> u32 {
        (self.0 >> 24 & 0xff_ffff) as u32
    }

    pub(super) fn is_unprotected(self) -> bool {
        self.0 & Self::UNPROTECTED != 0
    }

    pub(super) fn is_sampled(self) -> bool {
        self.0 & Self::SAMPLED != 0
    }
}

/// The plan for the faults in a block. It fits one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Whether unprotecting the whole block is estimated to be cheaper.
    pub(super) whole: bool,
    /// Whether the block, or a sample of it, was observed before.
    pub(super) observed: bool,
    /// The number of consecutive observations at which the whole block was cheaper, up to
    /// [`MAX_CONFIDENCE`].
    pub(super) confidence: u8,
    /// The number of checkpoints until the next sample.
    pub(super) until_sample: u8,
    /// The part of the block that is the next sample.
    pub(super) sample_part: u8,
    /// The moving average of the time that unprotecting the whole block would have saved at a
    /// checkpoint, in nanoseconds.
    gain: i32,
}

impl Plan {
    pub(super) fn from_word(word: u64) -> Self {
        let [flags, confidence, until_sample, sample_part, gain @ ..] = word.to_le_bytes();
        Self {
            whole: flags & 1 != 0,
            observed: flags & 2 != 0,
            confidence,
            until_sample,
            sample_part,
            gain: i32::from_le_bytes(gain),
        }
    }

    pub(super) fn to_word(self) -> u64 {
        let flags = u8::from(self.whole) | u8::from(self.observed) << 1;
        let [a, b, c, d] = self.gain.to_le_bytes();
        let (confidence, until_sample) = (self.confidence, self.until_sample);
        u64::from_le_bytes([
            flags,
            confidence,
            until_sample,
            self.sample_part,
            a,
            b,
            c,
            d,
        ])
    }

    /// Returns the plan after a checkpoint at which unprotecting the whole block would have saved
    /// `gain`.
    pub(super) fn after_observation(self, gain: i32) -> Self {
        let average = match self.observed {
            true => self.gain + (gain - self.gain) / 4,
            false => gain,
        };
        let confidence = match gain > 0 {
            true => MAX_CONFIDENCE.min(self.confidence + 1),
            false => 0,
        };
        Self {
            whole: average > 0,
            observed: true,
            confidence,
            until_sample: if confidence == MAX_CONFIDENCE {
                SAMPLE_INTERVAL - 1
            } else {
                0
            },
            // The step is odd, so that the samples cycle through all parts.
            sample_part: (self.sample_part + 5) % SAMPLE_PARTS as u8,
            gain: average,
        }
    }

    /// Returns the plan after a checkpoint without an observation: the block was unprotected
    /// without a sample.
    pub(super) fn after_no_observation(self) -> Self {
        Self {
            // A block that was unprotected because of its neighbor is evaluated on its own next.
            whole: self.whole || !self.observed,
            observed: true,
            until_sample: self.until_sample.saturating_sub(1),
            ..self
        }
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_plan_round_trips_through_its_word(
            whole: bool,
            observed: bool,
            confidence: u8,
            until_sample: u8,
            sample_part: u8,
            gain: i32,
        ) {
            let plan = Plan { whole, observed, confidence, until_sample, sample_part, gain };
            prop_assert_eq!(Plan::from_word(plan.to_word()), plan);
        }
    }
}
