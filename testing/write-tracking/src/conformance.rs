//! The macro that makes tests of the suite for a backend.

/// Makes a module with the tests of the suite for a backend: those of a running guest, too, unless
/// `stopped` follows. The calling crate needs `rstest`.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $backend:ty) => {
        mod $name {
            use super::*;

            $crate::conformance!(@stopped $backend);
            $crate::conformance!(@running $backend);
        }
    };
    ($name:ident, $backend:ty, stopped) => {
        mod $name {
            use super::*;

            $crate::conformance!(@stopped $backend);
        }
    };
    (@stopped $backend:ty) => {
        #[rstest::rstest]
        fn the_images_equal_the_ram_at_every_checkpoint(
            #[values(4096, 16384)] page_size: u64,
            #[values(
                dirty_bitmap::Policy::Pages,
                dirty_bitmap::Policy::Blocks,
                dirty_bitmap::Policy::FaultLimit(3),
                dirty_bitmap::Policy::default()
            )]
            policy: dirty_bitmap::Policy,
        ) {
            $crate::suite::saves::images_equal_the_ram::<$backend>(page_size, policy);
        }

        #[rstest::rstest]
        fn a_partly_failed_protection_loses_no_page(#[values(false, true)] extends: bool) {
            $crate::suite::faults::partly_failed_protection::<$backend>(extends);
        }

        #[cfg(target_os = "linux")]
        #[test]
        fn a_discarded_page_that_is_marked_becomes_zeros() {
            $crate::suite::saves::discarded_page::<$backend>();
        }

        #[test]
        fn a_refused_page_is_unprotected_with_its_block() {
            $crate::suite::faults::refused_page::<$backend>();
        }

        #[test]
        fn a_stopped_checkpoint_is_refused_while_a_vcpu_runs() {
            $crate::suite::faults::checkpoint_while_a_vcpu_runs::<$backend>();
        }
    };
    (@running $backend:ty) => {
        #[rstest::rstest]
        fn saves_while_all_vcpus_write_lose_no_page(
            #[values(4096, 16384)] page_size: u64,
            #[values(
                dirty_bitmap::Policy::Pages,
                dirty_bitmap::Policy::Blocks,
                dirty_bitmap::Policy::FaultLimit(3)
            )]
            policy: dirty_bitmap::Policy,
        ) {
            $crate::suite::saves::saves_while_all_vcpus_write::<$backend>(page_size, policy);
        }

        #[rstest::rstest]
        fn a_precopy_save_equals_the_ram_of_the_stopped_guest(
            #[values(4096, 16384)] page_size: u64,
        ) {
            $crate::suite::saves::precopy_save::<$backend>(page_size);
        }

        #[test]
        fn a_fault_unprotects_a_block_on_both_sides_of_a_gap() {
            $crate::suite::faults::block_across_a_gap::<$backend>();
        }

        #[test]
        fn a_checkpoint_is_refused_while_a_fault_is_being_handled() {
            $crate::suite::faults::checkpoint_during_a_fault::<$backend>();
        }

        #[rstest::rstest]
        fn a_write_right_after_protection_is_marked_again(#[values(false, true)] extends: bool) {
            $crate::suite::faults::write_after_protection::<$backend>(extends);
        }
    };
}

/// Makes a module with the tests of the suite for a backend with a log of dirty pages. The calling
/// crate needs `rstest`.
#[macro_export]
macro_rules! log_conformance {
    ($name:ident, $backend:ty) => {
        mod $name {
            use super::*;

            #[rstest::rstest]
            fn the_images_equal_the_ram_at_every_pause(#[values(512, 4096, 16384)] page_size: u64) {
                $crate::suite::logs::images_equal_the_ram::<$backend>(page_size);
            }

            #[test]
            fn saves_while_all_vcpus_write_lose_no_page() {
                $crate::suite::logs::saves_while_all_vcpus_write::<$backend>();
            }

            #[test]
            fn a_page_written_after_a_harvest_is_logged_again() {
                $crate::suite::logs::next_write::<$backend>();
            }

            #[cfg(target_os = "linux")]
            #[test]
            fn a_discarded_page_that_is_marked_becomes_zeros() {
                $crate::suite::logs::discarded_page::<$backend>();
            }
        }
    };
}
