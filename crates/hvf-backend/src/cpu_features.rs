//! The features that a CPU reports to a guest, with which guests move between kinds of Macs.

mod fields;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::state::{Encoding, VcpuState};
use fields::{Field, REGISTERS};

/// The features that a CPU reports to a guest: the values of its identification registers
/// (`ID_AA64*_EL1`).
///
/// A guest selects its instructions by these registers, mostly once at its start. A guest that is
/// to be restored on other Macs therefore begins with the features that all of them have. Collect
/// the features of each Mac, [intersect](Self::intersect) them, and create the machine with
/// `Vm::options().cpu_features(..)`. A snapshot contains the registers, and a restore checks that
/// the Mac has what the guest was promised.
///
/// It can be serialized in any serde format. Registers are serialized by their names.
///
/// # Examples
/// ```
/// use hvf_backend::{CpuFeatures, Encoding};
///
/// let isar0 = Encoding::from_name("ID_AA64ISAR0_EL1").ok_or("a known register")?;
/// let older = CpuFeatures::new([(isar0, 0x0000_1000)]); // SHA2: SHA256
/// let newer = CpuFeatures::new([(isar0, 0x0000_2020)]); // SHA2: SHA512 too, and AES
/// let both = older.intersect(&newer);
/// assert_eq!(both.value(isar0), Some(0x0000_1000));
/// assert!(newer.lacks(&both).is_empty());
/// assert_eq!(older.lacks(&newer)[0].to_string(), "ID_AA64ISAR0_EL1.AES is 0 and not 2");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<Encoding, u64>")]
pub struct CpuFeatures(BTreeMap<Encoding, u64>);

/// How the values of a field compare (Arm ARM, "Principles of the ID scheme for fields in ID
/// registers").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// A larger value includes what the smaller ones mean.
    Unsigned,
    /// As `Unsigned`, with 0xf below 0: it means that even the basic feature is missing.
    Signed,
    /// Values that differ mean different things. 0 is the absence.
    Exact,
    /// The value is a property of the machine, and is not compared.
    Machine,
}

/// A field of an identification register that a CPU lacks, returned by [`CpuFeatures::lacks`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MissingFeature {
    /// The register.
    pub register: Encoding,
    /// The name of the field in the Arm ARM. None for bits without a name in this version.
    pub field: Option<&'static str>,
    /// The value that is needed.
    pub needed: u64,
    /// The value that the CPU has.
    pub found: u64,
    from: u32,
}

impl CpuFeatures {
    /// Creates features from the values of registers. Ignores those that are not `ID_AA64*_EL1`.
    pub fn new(registers: impl IntoIterator<Item = (Encoding, u64)>) -> Self {
        let registers = registers.into_iter();
        Self(
            registers
                .filter(|(register, _)| is_known(*register))
                .collect(),
        )
    }

    /// Returns the features that the guest of a captured vCPU was promised.
    #[must_use]
    pub fn of_state(state: &VcpuState) -> Self {
        let system = state.system.iter();
        Self::new(system.map(|saved| (saved.register, saved.value)))
    }

    /// Returns the value of a register, if it is known.
    #[must_use]
    pub fn value(&self, register: Encoding) -> Option<u64> {
        self.0.get(&register).copied()
    }

    /// Returns the registers and their values.
    pub fn registers(&self) -> impl Iterator<Item = (Encoding, u64)> {
        self.0.iter().map(|(register, value)| (*register, *value))
    }

    /// Returns the features that both CPUs have.
    ///
    /// A register that only one of them has does not exist on an older system. Its features are
    /// absent, and its value is 0.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        let registers = self.0.keys().chain(other.0.keys());
        let both = registers.map(|register| {
            let (one, two) = (self.value(*register), other.value(*register));
            let (one, two) = (one.unwrap_or_default(), two.unwrap_or_default());
            let fields = all_fields(*register).into_iter();
            let value = fields.fold(0, |value, field| value | field.put(field.both(one, two)));
            (*register, value)
        });
        Self(both.collect())
    }

    /// Returns what `needed` has and this CPU lacks. Empty if a guest with the features of `needed`
    /// can run on this CPU.
    #[must_use]
    pub fn lacks(&self, needed: &Self) -> Vec<MissingFeature> {
        let registers = needed.registers();
        let missing = registers.flat_map(|(register, needed)| {
            let found = self.value(register).unwrap_or_default();
            let fields = all_fields(register).into_iter();
            let missing = fields.filter(move |field| !field.includes(found, needed));
            missing.map(move |field| MissingFeature {
                register,
                field: (!field.name.is_empty()).then_some(field.name),
                needed: field.get(needed),
                found: field.get(found),
                from: field.from,
            })
        });
        missing.collect()
    }
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = self.register;
        match self.field {
            Some(name) => write!(f, "{register}.{name}")?,
            None => write!(f, "{register} from bit {}", self.from)?,
        }
        write!(f, " is {} and not {}", self.found, self.needed)
    }
}

impl From<BTreeMap<Encoding, u64>> for CpuFeatures {
    fn from(registers: BTreeMap<Encoding, u64>) -> Self {
        Self::new(registers)
    }
}

/// Returns the encodings of the registers, in ascending order.
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub(crate) fn encodings() -> impl Iterator<Item = Encoding> {
    REGISTERS.iter().map(|(register, _)| Encoding(*register))
}

/// Returns the text of an error that lists features.
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub(crate) fn listed(missing: &[MissingFeature]) -> String {
    let texts: Vec<_> = missing.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

fn is_known(register: Encoding) -> bool {
    REGISTERS.iter().any(|(known, _)| *known == register.0)
}

/// Returns the fields of a register that cover all of its bits.
///
/// Bits without a name are fields of 4 bits, or less, which a later version of the architecture may
/// define. Most fields are unsigned.
fn all_fields(register: Encoding) -> Vec<Field> {
    let known = REGISTERS.iter().find(|(known, _)| *known == register.0);
    let named = known.map_or(&[][..], |(_, fields)| *fields);
    let covered = named
        .iter()
        .fold(0, |bits, field| bits | field.put(u64::MAX));
    let unnamed = (0..64).step_by(4).flat_map(|from| {
        let whole = covered >> from & 0xf == 0;
        let (bits, count) = if whole { (4, 1) } else { (1, 4) };
        (0..count).map(move |number| Field {
            name: "",
            from: from + number * bits,
            bits,
            order: Order::Unsigned,
        })
    });
    let unnamed = unnamed.filter(|field| covered & field.put(u64::MAX) == 0);
    named.iter().copied().chain(unnamed).collect()
}

impl Field {
    fn mask(self) -> u64 {
        (1 << self.bits) - 1
    }

    fn get(self, register: u64) -> u64 {
        register >> self.from & self.mask()
    }

    fn put(self, value: u64) -> u64 {
        (value & self.mask()) << self.from
    }

    /// Returns a number that is larger the more the value means.
    fn rank(self, value: u64) -> u64 {
        match self.order {
            // 0xf becomes the smallest.
            Order::Signed => (value + 1) & self.mask(),
            Order::Unsigned | Order::Exact | Order::Machine => value,
        }
    }

    /// Returns the value of the field that both registers include.
    fn both(self, one: u64, two: u64) -> u64 {
        let (one, two) = (self.get(one), self.get(two));
        match self.order {
            Order::Exact if one != two => 0,
            _ if self.rank(one) <= self.rank(two) => one,
            _ => two,
        }
    }

    /// Returns whether the field of `found` includes that of `needed`.
    fn includes(self, found: u64, needed: u64) -> bool {
        let (found, needed) = (self.get(found), self.get(needed));
        match self.order {
            Order::Exact => needed == 0 || found == needed,
            Order::Machine => true,
            Order::Unsigned | Order::Signed => self.rank(found) >= self.rank(needed),
        }
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    fn features(name: &str, value: u64) -> CpuFeatures {
        CpuFeatures::new([(Encoding::from_name(name).unwrap(), value)])
    }

    fn both(name: &str, one: u64, two: u64) -> u64 {
        let both = features(name, one).intersect(&features(name, two));
        both.value(Encoding::from_name(name).unwrap()).unwrap()
    }

    #[test]
    fn fields_cover_each_register_once() {
        for (register, _) in REGISTERS {
            let mut covered = 0;
            for field in all_fields(Encoding(register)) {
                let bits = field.put(u64::MAX);
                assert_eq!(covered & bits, 0, "{register:#x} {}", field.name);
                covered |= bits;
            }
            assert_eq!(covered, u64::MAX, "{register:#x}");
        }
    }

    #[test]
    fn the_smaller_unsigned_value_is_of_both() {
        assert_eq!(both("ID_AA64ISAR0_EL1", 0x2120, 0x1220), 0x1120);
        assert_eq!(both("ID_AA64MMFR0_EL1", 0x6, 0x2), 0x2);
        // ISAR0 has no name for its lowest bits, SMFR0 none for bit 1.
        assert_eq!(both("ID_AA64ISAR0_EL1", 3, 1), 1);
        assert_eq!(both("ID_AA64SMFR0_EL1", 1 << 63 | 1 << 1, 1 << 63), 1 << 63);
    }

    #[test]
    fn missing_is_below_basic_in_signed_fields() {
        // FP and AdvSIMD: 0xf is none, 0 is basic, 1 has half precision.
        let pfr0 = "ID_AA64PFR0_EL1";
        assert_eq!(both(pfr0, 0x11_0000, 0), 0);
        assert_eq!(both(pfr0, 0x11_0000, 0xff_0000), 0xff_0000);
        let basic = features(pfr0, 0);
        assert!(basic.lacks(&features(pfr0, 0xff_0000)).is_empty());
        assert_eq!(features(pfr0, 0xff_0000).lacks(&basic).len(), 2);
    }

    #[test]
    fn algorithms_that_differ_are_absent() {
        let isar1 = "ID_AA64ISAR1_EL1";
        assert_eq!(both(isar1, 0x500, 0x400), 0);
        assert_eq!(both(isar1, 0x500, 0x500), 0x500);
        let missing = features(isar1, 0x500).lacks(&features(isar1, 0x400));
        assert_eq!(
            missing[0].to_string(),
            "ID_AA64ISAR1_EL1.API is 5 and not 4"
        );
        assert!(features(isar1, 0x500).lacks(&features(isar1, 0)).is_empty());
    }

    #[test]
    fn a_register_of_one_cpu_is_absent_in_both() {
        let smfr0 = Encoding::from_name("ID_AA64SMFR0_EL1").unwrap();
        let with = CpuFeatures::new([(smfr0, 1 << 63 | 1)]);
        let none = CpuFeatures::default();
        assert_eq!(with.intersect(&none).value(smfr0), Some(0));
        assert_eq!(none.lacks(&with).len(), 2);
        let unnamed = CpuFeatures::new([(smfr0, 0b10)]);
        let text = none.lacks(&unnamed)[0].to_string();
        assert_eq!(text, "ID_AA64SMFR0_EL1 from bit 1 is 0 and not 1");
    }

    #[test]
    fn other_registers_are_ignored() {
        let sctlr = Encoding::from_name("SCTLR_EL1").unwrap();
        assert_eq!(CpuFeatures::new([(sctlr, 1)]), CpuFeatures::default());
        let read = serde_json::from_str::<CpuFeatures>(r#"{"SCTLR_EL1":1}"#).unwrap();
        assert_eq!(read, CpuFeatures::default());
    }

    #[test]
    fn the_interrupt_controller_is_not_compared() {
        let with = features("ID_AA64PFR0_EL1", 1 << 24);
        assert!(features("ID_AA64PFR0_EL1", 0).lacks(&with).is_empty());
    }

    #[test]
    fn features_round_trip_through_json_by_name() {
        let features = features("ID_AA64ISAR0_EL1", 0x20);
        let text = serde_json::to_string(&features).unwrap();
        assert_eq!(text, r#"{"ID_AA64ISAR0_EL1":32}"#);
        assert_eq!(
            serde_json::from_str::<CpuFeatures>(&text).unwrap(),
            features
        );
    }
}
