//! Apple's Hypervisor framework over the emulator Unicorn.
//!
//! A program that links this crate needs no Mac: the crate exports the framework's functions by
//! their C names, and the few functions of macOS that `hvf-backend` and `applevisor` call besides.
//! Guests run in Unicorn, which the crate loads at run time (`libunicorn.so.2`). `cargo xtask
//! fake-hvf` builds `hvf-backend` with `--cfg hvf_fake` and runs its tests over this crate.
//!
//! The functions are as strict as Apple's headers. A call on the wrong thread, a misaligned range
//! or a second machine is refused with the framework's code. Where the headers leave the order of
//! calls open, this crate refuses the doubtful one, so that no caller depends on it.
//!
//! [`control`] makes calls fail, removes functions of newer systems, and reports what is mapped.
//!
//! # Limitations
//! - **No address translation of the guest.** Virtual addresses are guest-physical ones. The
//!   registers of translation are stored, and the guest's tables are never read.
//! - **Caches, memory attributes and the order of memory accesses are those of the host.** Only
//!   translated code is cached: code that the host replaces is stale until `ic ivau`.
//! - **Atomic instructions of several vCPUs are not atomic to each other.**
//! - **The guest does not reach the interrupt controller**: not by memory, and not by instructions.
//!   The host sets its registers. Shared interrupts are signalled to the vCPU of their route, and
//!   no guest acknowledges one. There are no private interrupts, and timers signal none.
//! - **Syndromes have no instruction-specific part** (ISV is 0). The framework sets it for most
//!   loads and stores.
//! - Exceptions that the guest takes are interrupts, `svc`, `brk` and undefined instructions.
//! - Exception level 2, SME instructions, breakpoints, watchpoints and the performance monitor are
//!   registers without an effect.
//! - Times are those of an emulator.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unsafe_code, reason = "C functions, and callbacks of a C library")]
#![allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::missing_safety_doc,
    reason = "the framework's own functions, with the contracts of Apple's headers"
)]

mod calls;
pub mod control;
mod emulation;
mod gic;
mod interrupts;
mod macos;
mod memory;
mod objects;
mod registers;
mod sme;
mod system_registers;
mod systems;
mod timer;
mod unicorn;
mod vcpu;
mod vm;

pub use calls::Code;
pub use gic::{
    hv_gic_config_create, hv_gic_config_set_distributor_base,
    hv_gic_config_set_msi_interrupt_range, hv_gic_config_set_msi_region_base,
    hv_gic_config_set_redistributor_base, hv_gic_create, hv_gic_get_distributor_base_alignment,
    hv_gic_get_distributor_reg, hv_gic_get_distributor_size, hv_gic_get_icc_reg,
    hv_gic_get_msi_region_base_alignment, hv_gic_get_msi_region_size,
    hv_gic_get_redistributor_base, hv_gic_get_redistributor_base_alignment,
    hv_gic_get_redistributor_reg, hv_gic_get_redistributor_region_size,
    hv_gic_get_redistributor_size, hv_gic_get_spi_interrupt_range, hv_gic_reset, hv_gic_send_msi,
    hv_gic_set_distributor_reg, hv_gic_set_icc_reg, hv_gic_set_redistributor_reg, hv_gic_set_spi,
    hv_gic_set_state, hv_gic_state_create, hv_gic_state_get_data, hv_gic_state_get_size,
};
pub use interrupts::{hv_vcpu_get_pending_interrupt, hv_vcpu_set_pending_interrupt};
pub use macos::{
    dlsym, mach_absolute_time, mach_task_self_, mach_vm_page_range_query, minherit, mmap, mmap64,
    os_release, sys_icache_invalidate, sysconf, sysctlbyname,
};
pub use memory::{hv_vm_allocate, hv_vm_deallocate, hv_vm_map, hv_vm_protect, hv_vm_unmap};
pub use registers::{
    hv_vcpu_get_reg, hv_vcpu_get_simd_fp_reg, hv_vcpu_set_reg, hv_vcpu_set_simd_fp_reg,
};
pub use sme::{
    SmeState, hv_sme_config_get_max_svl_bytes, hv_vcpu_get_sme_p_reg, hv_vcpu_get_sme_state,
    hv_vcpu_get_sme_z_reg, hv_vcpu_get_sme_za_reg, hv_vcpu_get_sme_zt0_reg, hv_vcpu_set_sme_p_reg,
    hv_vcpu_set_sme_state, hv_vcpu_set_sme_z_reg, hv_vcpu_set_sme_za_reg, hv_vcpu_set_sme_zt0_reg,
};
pub use system_registers::{hv_vcpu_get_sys_reg, hv_vcpu_set_sys_reg};
pub use timer::{
    hv_vcpu_get_vtimer_mask, hv_vcpu_get_vtimer_offset, hv_vcpu_set_vtimer_mask,
    hv_vcpu_set_vtimer_offset,
};
pub use vcpu::{
    ExitException, VcpuExit, hv_vcpu_config_create, hv_vcpu_create, hv_vcpu_destroy,
    hv_vcpu_get_exec_time, hv_vcpu_get_trap_debug_exceptions, hv_vcpu_get_trap_debug_reg_accesses,
    hv_vcpu_run, hv_vcpu_set_trap_debug_exceptions, hv_vcpu_set_trap_debug_reg_accesses,
    hv_vcpus_exit, hv_vm_get_max_vcpu_count,
};
pub use vm::{
    hv_vm_config_create, hv_vm_config_get_default_ipa_granule, hv_vm_config_get_default_ipa_size,
    hv_vm_config_get_el2_enabled, hv_vm_config_get_el2_supported, hv_vm_config_get_ipa_granule,
    hv_vm_config_get_ipa_size, hv_vm_config_get_max_ipa_size, hv_vm_config_set_el2_enabled,
    hv_vm_config_set_ipa_granule, hv_vm_config_set_ipa_size, hv_vm_create, hv_vm_destroy,
};
