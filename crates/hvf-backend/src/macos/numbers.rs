//! The numbers of `applevisor-sys` that this crate passes to the framework or stores, compared at
//! compile time with those of Apple's headers (macOS 26 SDK).
//!
//! `hv_kern_types.h` has the codes and permissions, `Hypervisor/hv_vcpu_types.h` the registers,
//! interrupts and reasons of exits, `Hypervisor/hv_gic_types.h` the registers of the interrupt
//! controller, and `Hypervisor/hv_vm_types.h` the page sizes of stage 2.

use applevisor_sys as framework;
use framework::{hv_interrupt_type_t, hv_vcpu_exit_exception_t, hv_vcpu_exit_t};

use crate::register_names::{gic_cpu_registers, system_registers};

/// `HV_INTERRUPT_TYPE_IRQ` is 0 and `HV_INTERRUPT_TYPE_FIQ` is 1. `applevisor-sys` has the names
/// the other way round.
pub(super) const IRQ: hv_interrupt_type_t = hv_interrupt_type_t::FIQ;
pub(super) const FIQ: hv_interrupt_type_t = hv_interrupt_type_t::IRQ;

/// `hv_exit_reason_t`. A reason of a later macOS is another number.
pub(super) const EXIT_CANCELED: u32 = 0;
pub(super) const EXIT_EXCEPTION: u32 = 1;
pub(super) const EXIT_VTIMER_ACTIVATED: u32 = 2;

/// Fails to compile if a variant has another number.
macro_rules! assert_numbers {
    ($type:ident: $($name:ident = $number:expr,)*) => {
        const _: () = {
            $(assert!(
                framework::$type::$name as u32 == $number,
                concat!(stringify!($name), " of applevisor-sys differs from Apple's header"),
            );)*
        };
    };
}

macro_rules! assert_system_registers {
    ($($name:ident = $number:literal,)*) => {
        assert_numbers!(hv_sys_reg_t: $($name = $number,)*);
    };
}
system_registers!(assert_system_registers);

macro_rules! assert_gic_cpu_registers {
    ($($name:ident = $number:literal,)*) => {
        assert_numbers!(hv_gic_icc_reg_t: $($name = $number,)*);
    };
}
gic_cpu_registers!(assert_gic_cpu_registers);

assert_numbers!(hv_reg_t:
    X0 = 0, X1 = 1, X2 = 2, X3 = 3, X4 = 4, X5 = 5, X6 = 6, X7 = 7, X8 = 8, X9 = 9, X10 = 10,
    X11 = 11, X12 = 12, X13 = 13, X14 = 14, X15 = 15, X16 = 16, X17 = 17, X18 = 18, X19 = 19,
    X20 = 20, X21 = 21, X22 = 22, X23 = 23, X24 = 24, X25 = 25, X26 = 26, X27 = 27, X28 = 28,
    X29 = 29, X30 = 30, PC = 31, FPCR = 32, FPSR = 33, CPSR = 34,
);
assert_numbers!(hv_simd_fp_reg_t:
    Q0 = 0, Q1 = 1, Q2 = 2, Q3 = 3, Q4 = 4, Q5 = 5, Q6 = 6, Q7 = 7, Q8 = 8, Q9 = 9, Q10 = 10,
    Q11 = 11, Q12 = 12, Q13 = 13, Q14 = 14, Q15 = 15, Q16 = 16, Q17 = 17, Q18 = 18, Q19 = 19,
    Q20 = 20, Q21 = 21, Q22 = 22, Q23 = 23, Q24 = 24, Q25 = 25, Q26 = 26, Q27 = 27, Q28 = 28,
    Q29 = 29, Q30 = 30, Q31 = 31,
);
assert_numbers!(hv_error_t:
    HV_SUCCESS = 0, HV_ERROR = 0xfae9_4001, HV_BUSY = 0xfae9_4002, HV_BAD_ARGUMENT = 0xfae9_4003,
    HV_ILLEGAL_GUEST_STATE = 0xfae9_4004, HV_NO_RESOURCES = 0xfae9_4005,
    HV_NO_DEVICE = 0xfae9_4006, HV_DENIED = 0xfae9_4007, HV_FAULT = 0xfae9_4008,
    HV_UNSUPPORTED = 0xfae9_400f,
);
assert_numbers!(hv_exit_reason_t:
    CANCELED = EXIT_CANCELED, EXCEPTION = EXIT_EXCEPTION,
    VTIMER_ACTIVATED = EXIT_VTIMER_ACTIVATED, UNKNOWN = 3,
);
assert_numbers!(hv_ipa_granule_t: HV_IPA_GRANULE_4KB = 0, HV_IPA_GRANULE_16KB = 1,);

const _: () = {
    assert!(IRQ as u32 == 0 && FIQ as u32 == 1);
    assert!(framework::HV_MEMORY_READ == 1 << 0);
    assert!(framework::HV_MEMORY_WRITE == 1 << 1);
    assert!(framework::HV_MEMORY_EXEC == 1 << 2);
    assert!(framework::PAGE_SIZE == 16 << 10);
    // `hv_vcpu_exit_t`: a number of 32 bits, then three of 64 bits.
    assert!(size_of::<hv_vcpu_exit_t>() == 32);
    assert!(std::mem::offset_of!(hv_vcpu_exit_t, exception) == 8);
    assert!(std::mem::offset_of!(hv_vcpu_exit_exception_t, syndrome) == 0);
    assert!(std::mem::offset_of!(hv_vcpu_exit_exception_t, virtual_address) == 8);
    assert!(std::mem::offset_of!(hv_vcpu_exit_exception_t, physical_address) == 16);
    // `hv_vcpu_sme_state_t`: two bytes.
    assert!(size_of::<framework::hv_vcpu_sme_state_t>() == 2);
};
