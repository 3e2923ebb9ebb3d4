//! Versions of macOS, and the functions that each has added.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A version of macOS in which the framework has grown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum System {
    MacOs11,
    MacOs12_1,
    MacOs13,
    MacOs15,
    MacOs15_2,
    MacOs26,
}

impl System {
    const ALL: [Self; 6] = [
        Self::MacOs11,
        Self::MacOs12_1,
        Self::MacOs13,
        Self::MacOs15,
        Self::MacOs15_2,
        Self::MacOs26,
    ];
}

static SYSTEM: AtomicU8 = AtomicU8::new(System::MacOs26 as u8);

/// Returns the version of macOS that runs here.
pub(crate) fn current() -> System {
    System::ALL[usize::from(SYSTEM.load(Relaxed))]
}

pub(crate) fn set(system: System) {
    SYSTEM.store(system as u8, Relaxed);
}

/// Calls a macro with all functions of the framework, by the version that has added them.
macro_rules! with_functions {
    ($callback:ident) => {
        $callback! {
            MacOs11:
                hv_vcpu_config_create hv_vcpu_create hv_vcpu_destroy hv_vcpu_get_exec_time
                hv_vcpu_get_pending_interrupt hv_vcpu_get_reg hv_vcpu_get_simd_fp_reg hv_vcpu_get_sys_reg
                hv_vcpu_get_trap_debug_exceptions hv_vcpu_get_trap_debug_reg_accesses
                hv_vcpu_get_vtimer_mask hv_vcpu_get_vtimer_offset hv_vcpu_run
                hv_vcpu_set_pending_interrupt hv_vcpu_set_reg hv_vcpu_set_simd_fp_reg hv_vcpu_set_sys_reg
                hv_vcpu_set_trap_debug_exceptions hv_vcpu_set_trap_debug_reg_accesses
                hv_vcpu_set_vtimer_mask hv_vcpu_set_vtimer_offset hv_vcpus_exit hv_vm_create
                hv_vm_destroy hv_vm_get_max_vcpu_count hv_vm_map hv_vm_protect hv_vm_unmap;
            MacOs12_1: hv_vm_allocate hv_vm_deallocate;
            MacOs13:
                hv_vm_config_create hv_vm_config_get_default_ipa_size hv_vm_config_get_ipa_size
                hv_vm_config_get_max_ipa_size hv_vm_config_set_ipa_size;
            MacOs15:
                hv_gic_config_create hv_gic_config_set_distributor_base
                hv_gic_config_set_msi_interrupt_range hv_gic_config_set_msi_region_base
                hv_gic_config_set_redistributor_base hv_gic_create hv_gic_get_distributor_base_alignment
                hv_gic_get_distributor_reg hv_gic_get_distributor_size hv_gic_get_icc_reg
                hv_gic_get_msi_region_base_alignment hv_gic_get_msi_region_size
                hv_gic_get_redistributor_base hv_gic_get_redistributor_base_alignment
                hv_gic_get_redistributor_reg hv_gic_get_redistributor_region_size
                hv_gic_get_redistributor_size hv_gic_get_spi_interrupt_range hv_gic_reset
                hv_gic_send_msi hv_gic_set_distributor_reg hv_gic_set_icc_reg
                hv_gic_set_redistributor_reg hv_gic_set_spi
                hv_gic_set_state hv_gic_state_create hv_gic_state_get_data hv_gic_state_get_size
                hv_vm_config_get_el2_enabled hv_vm_config_get_el2_supported hv_vm_config_set_el2_enabled;
            MacOs15_2:
                hv_sme_config_get_max_svl_bytes hv_vcpu_get_sme_p_reg hv_vcpu_get_sme_state
                hv_vcpu_get_sme_z_reg hv_vcpu_get_sme_za_reg hv_vcpu_get_sme_zt0_reg
                hv_vcpu_set_sme_p_reg hv_vcpu_set_sme_state hv_vcpu_set_sme_z_reg hv_vcpu_set_sme_za_reg
                hv_vcpu_set_sme_zt0_reg;
            MacOs26:
                hv_vm_config_get_default_ipa_granule hv_vm_config_get_ipa_granule
                hv_vm_config_set_ipa_granule;
        }
    };
}
pub(crate) use with_functions;

macro_rules! versions {
    ($($since:ident: $($name:ident)*;)*) => {
        &[$($((stringify!($name), System::$since),)*)*]
    };
}

const FUNCTIONS: &[(&str, System)] = with_functions!(versions);

/// Returns whether this system has the function. One that is not in the table is of all systems.
pub(crate) fn has(name: &str) -> bool {
    let mut functions = FUNCTIONS.iter();
    let found = functions.find(|(function, _)| *function == name);
    found.is_none_or(|(_, since)| *since <= current())
}

/// Ends the process if this system does not have the function: macOS starts no program that imports
/// it.
pub(crate) fn assert_has(name: &str) {
    assert!(
        has(name),
        "{name} was called, but {:?} has no such function",
        current()
    );
}
