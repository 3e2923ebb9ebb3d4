//! Decoding of the exception syndrome of an abort (ESR_EL2).
//!
//! The fields and rules are in the Arm Architecture Reference Manual (DDI 0487), ESR_EL2, "ISS
//! encoding for an exception from a Data Abort" and "ISS encoding for an exception from an
//! Instruction Abort".

/// Exception classes (ESR_EL2.EC, bits 31 to 26) of aborts from a lower exception level, which is
/// the guest.
const INSTRUCTION_ABORT: u64 = 0x20;
const DATA_ABORT: u64 = 0x24;

/// Bits of the syndrome of an abort.
const CACHE_MAINTENANCE: u64 = 1 << 8;
const STAGE_1_WALK: u64 = 1 << 7;
const WRITE: u64 = 1 << 6;

/// A guest access that stage 2 denied.
///
/// The decoding ignores ISV, which is 0 for pairs and vectors, and the kind of the fault. A page
/// that was never touched reports a translation fault, a page that was touched before a permission
/// fault.
///
/// # Examples
/// ```
/// use hvf_backend::Access;
///
/// let store_to_a_protected_page = 0x9200_004f; // data abort, WnR, permission fault at level 3
/// assert_eq!(Access::of(store_to_a_protected_page), Some(Access::Write));
/// assert!(Access::Write.may_write());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Access {
    /// An instruction fetch.
    Fetch,
    /// A load.
    Read,
    /// A store, an atomic update whose load is permitted, or `DC ZVA`.
    Write,
    /// A cache maintenance or address translation instruction.
    ///
    /// It always reports WnR = 1. Among them, `DC IVAC` needs write permission.
    CacheMaintenance,
    /// A walk of the guest's page tables by the processor, on behalf of any access.
    ///
    /// WnR then describes the access and not the walk. The walk writes when it sets an access flag
    /// or a dirty state, also for a fetch or a load. Only such an update needs write permission. In
    /// readable RAM, the fault therefore is such an update (Linux, `kvm_is_write_fault` in
    /// `arch/arm64/include/asm/kvm_emulate.h`, and commits c4ad98e4b72c and 406504c7b040).
    PageTableWalk,
}

impl Access {
    /// Returns the access of an exit with this syndrome, or `None` if the permissions of stage 2
    /// did not cause the exit.
    ///
    /// `None` stands for another exception class, and for an abort that unprotecting the page does
    /// not resolve: an external, alignment or address size abort, or an unsupported atomic update.
    #[must_use]
    pub fn of(syndrome: u64) -> Option<Self> {
        let is = |bit: u64| syndrome & bit != 0;
        let class = (syndrome >> 26) & 0x3f;
        if !(class == INSTRUCTION_ABORT || class == DATA_ABORT) || !is_mmu_fault(syndrome) {
            return None;
        }
        Some(match class {
            _ if is(STAGE_1_WALK) => Self::PageTableWalk,
            INSTRUCTION_ABORT => Self::Fetch,
            _ if is(CACHE_MAINTENANCE) => Self::CacheMaintenance,
            _ if is(WRITE) => Self::Write,
            _ => Self::Read,
        })
    }

    /// Returns whether the access is a write or may need write permission.
    ///
    /// An access wrongly taken for a write costs a page in a diff. A write that is not recognized
    /// makes the guest fault endlessly.
    #[must_use]
    pub fn may_write(self) -> bool {
        matches!(
            self,
            Self::Write | Self::CacheMaintenance | Self::PageTableWalk
        )
    }
}

/// Returns whether the fault status code (bits 5 to 0) is a translation, access flag or permission
/// fault at any level.
fn is_mmu_fault(syndrome: u64) -> bool {
    matches!(syndrome & 0x3f, 0x04..=0x0f | 0x2b)
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const DABT: u64 = DATA_ABORT << 26 | IL;
    const IABT: u64 = INSTRUCTION_ABORT << 26 | IL;
    /// A 32-bit instruction.
    const IL: u64 = 1 << 25;
    const ISV: u64 = 1 << 24;
    const WNR: u64 = 1 << 6;
    const S1PTW: u64 = 1 << 7;
    const CM: u64 = 1 << 8;
    const FNV: u64 = 1 << 10;

    #[rstest]
    #[case::page_never_touched(0x07)]
    #[case::page_touched_before(0x0f)]
    #[case::block_mapping(0x0e)]
    #[case::no_access_flag(0x0b)]
    #[case::level_minus_one(0x2b)]
    fn a_store_is_a_write_for_every_kind_of_fault(#[case] status: u64) {
        for more in [0, ISV, ISV | 3 << 22 | 5 << 16, FNV] {
            assert_eq!(Access::of(DABT | WNR | more | status), Some(Access::Write));
            assert_eq!(Access::of(DABT | more | status), Some(Access::Read));
        }
    }

    #[rstest]
    #[case::store(DABT | WNR)]
    #[case::load(DABT)]
    #[case::address_translation(DABT | CM | WNR)]
    #[case::fetch(IABT)]
    fn a_page_table_walk_may_write_for_any_access(#[case] access: u64) {
        for status in [0x07, 0x0d, 0x0f] {
            let access = Access::of(access | S1PTW | status);
            assert_eq!(access, Some(Access::PageTableWalk));
        }
        assert!(Access::PageTableWalk.may_write());
    }

    #[test]
    fn cache_maintenance_may_write_and_a_fetch_may_not() {
        let maintenance = Access::of(DABT | CM | WNR | 0x0f).unwrap();
        assert_eq!(
            (maintenance, maintenance.may_write()),
            (Access::CacheMaintenance, true)
        );
        let fetch = Access::of(IABT | 0x0f).unwrap();
        assert_eq!((fetch, fetch.may_write()), (Access::Fetch, false));
    }

    #[rstest]
    #[case::address_too_large(0x03)]
    #[case::address_too_large_at_level_minus_one(0x29)]
    #[case::external_abort(0x10)]
    #[case::external_abort_on_a_walk(0x15)]
    #[case::parity_error(0x18)]
    #[case::alignment_fault(0x21)]
    #[case::tlb_conflict(0x30)]
    #[case::unsupported_hardware_update(0x31)]
    #[case::unsupported_atomic(0x35)]
    fn other_aborts_of_the_guest_are_not_an_access(#[case] status: u64) {
        assert_eq!(Access::of(DABT | WNR | status), None);
        assert_eq!(Access::of(DABT | WNR | S1PTW | status), None);
    }

    #[rstest]
    #[case::unknown(0x00)]
    #[case::wfi(0x01)]
    #[case::hvc(0x16)]
    #[case::system_register(0x18)]
    #[case::instruction_abort_of_the_hypervisor(0x21)]
    #[case::pc_alignment(0x22)]
    #[case::data_abort_of_the_hypervisor(0x25)]
    #[case::breakpoint(0x3c)]
    fn other_exception_classes_are_not_an_access(#[case] class: u64) {
        assert_eq!(Access::of(class << 26 | IL | WNR | 0x0f), None);
    }

    proptest! {
        #[test]
        fn only_aborts_of_the_guest_are_accesses(syndrome: u64) {
            let access = Access::of(syndrome);
            let class = (syndrome >> 26) & 0x3f;
            prop_assert!(access.is_none() || class == 0x20 || class == 0x24);
            let with_iss2 = syndrome | 0x1f << 32; // newer fields
            prop_assert_eq!(Access::of(with_iss2), access);
        }

        /// The expected value is computed from the separate fields.
        #[test]
        fn may_write_agrees_with_the_fields_of_the_syndrome(data: bool, bits in 0_u64..1 << 25) {
            let syndrome = if data { DABT } else { IABT } | bits;
            let mmu = matches!(bits & 0x3f, 0x04..=0x0f | 0x2b);
            let writes = mmu && (bits & S1PTW != 0 || data && bits & (WNR | CM) != 0);
            prop_assert_eq!(Access::of(syndrome).is_some_and(Access::may_write), writes);
        }
    }
}
