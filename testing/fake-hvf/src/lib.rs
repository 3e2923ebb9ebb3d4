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
//! A guest translates its addresses by page tables of its own (SCTLR_EL1.M, TCR_EL1, TTBR0_EL1 and
//! TTBR1_EL1): of 4, 16 and 64 KiB, with blocks, permissions, access flags and dirty states. This
//! crate walks the tables, because Unicorn cannot run such a guest: version 2.0.1 looks up memory,
//! and calls back, by the virtual address before it translates it. While Unicorn's translation is
//! off, it refuses addresses of the upper half (both seen with its model `max`). So each page that
//! the guest accesses is mapped into Unicorn at its virtual address. [`tables`] builds tables for
//! guests of tests.
//!
//! # Limitations
//! - **Translation**: addresses have at most 47 bits in each half, and the lowest 5 MiB of the
//!   upper half of 47 bits are in use. There are no ASIDs: a write of TTBR0_EL1 or TTBR1_EL1
//!   forgets all translations, as each `tlbi` does. PSTATE.PAN has no effect, `ldtr` and `sttr` are
//!   accesses of the present level, and pages that level 0 may only execute are readable there.
//!   `at` does not use the guest's tables.
//! - **After an exception from level 0**, level 1 executes no privileged instructions. Unicorn
//!   decodes by a cached exception level, which writing PSTATE does not change (`uc_reg_write`).
//! - **Caches, memory attributes and the order of memory accesses are those of the host.** Only
//!   translated code is cached: code that the host replaces is stale until `ic ivau`.
//! - **Atomic instructions of several vCPUs are not atomic to each other.** Each alone faults and
//!   is repeated whole, as do exclusive, pair and vector stores and `dc zva`.
//! - **Instructions that maintain data caches access no memory**, so they cause no fault.
//! - **The guest does not reach the interrupt controller**: not by memory, and not by instructions.
//!   The host sets its registers. Shared interrupts are signalled to the vCPU of their route, and
//!   no guest acknowledges one. There are no private interrupts, and timers signal none.
//! - **Syndromes have no instruction-specific part** (ISV is 0). The framework sets it for most
//!   loads and stores.
//! - Exceptions that the guest takes are interrupts, `svc`, `brk`, undefined instructions, and
//!   aborts of its own page tables. Alignment is not checked.
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
mod exit;
mod gic;
mod gic_registers;
mod host;
mod identity;
mod interrupts;
mod machine;
mod macos;
mod memory;
mod objects;
mod page_tables;
mod registers;
mod sme;
mod state;
mod symbols;
mod system_registers;
mod systems;
pub mod tables;
mod timer;
mod translations;
mod unicorn;
mod vcpu;
mod vcpu_registers;
mod vcpu_sme;
mod vcpus;
mod vm;

pub use calls::Code;
pub use exit::{ExitException, VcpuExit};
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
pub use macos::{
    dlsym, mach_absolute_time, mach_task_self_, mach_vm_page_range_query, minherit, mmap, mmap64,
    os_release, sys_icache_invalidate, sysconf, sysctlbyname,
};
pub use memory::{hv_vm_allocate, hv_vm_deallocate, hv_vm_map, hv_vm_protect, hv_vm_unmap};
pub use sme::SmeState;
pub use vcpu::{
    hv_vcpu_config_create, hv_vcpu_create, hv_vcpu_destroy, hv_vcpu_get_exec_time,
    hv_vcpu_get_trap_debug_exceptions, hv_vcpu_get_trap_debug_reg_accesses, hv_vcpu_run,
    hv_vcpu_set_trap_debug_exceptions, hv_vcpu_set_trap_debug_reg_accesses, hv_vcpus_exit,
    hv_vm_get_max_vcpu_count,
};
pub use vcpu_registers::{
    hv_vcpu_get_pending_interrupt, hv_vcpu_get_reg, hv_vcpu_get_simd_fp_reg, hv_vcpu_get_sys_reg,
    hv_vcpu_get_vtimer_mask, hv_vcpu_get_vtimer_offset, hv_vcpu_set_pending_interrupt,
    hv_vcpu_set_reg, hv_vcpu_set_simd_fp_reg, hv_vcpu_set_sys_reg, hv_vcpu_set_vtimer_mask,
    hv_vcpu_set_vtimer_offset,
};
pub use vcpu_sme::{
    hv_sme_config_get_max_svl_bytes, hv_vcpu_get_sme_p_reg, hv_vcpu_get_sme_state,
    hv_vcpu_get_sme_z_reg, hv_vcpu_get_sme_za_reg, hv_vcpu_get_sme_zt0_reg, hv_vcpu_set_sme_p_reg,
    hv_vcpu_set_sme_state, hv_vcpu_set_sme_z_reg, hv_vcpu_set_sme_za_reg, hv_vcpu_set_sme_zt0_reg,
};
pub use vm::{
    hv_vm_config_create, hv_vm_config_get_default_ipa_granule, hv_vm_config_get_default_ipa_size,
    hv_vm_config_get_el2_enabled, hv_vm_config_get_el2_supported, hv_vm_config_get_ipa_granule,
    hv_vm_config_get_ipa_size, hv_vm_config_get_max_ipa_size, hv_vm_config_set_el2_enabled,
    hv_vm_config_set_ipa_granule, hv_vm_config_set_ipa_size, hv_vm_create, hv_vm_destroy,
};

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// The modules. Each uses only modules before it.
    const LAYERS: [&str; 29] = [
        "unicorn",
        "host",
        "systems",
        "calls",
        "objects",
        "exit",
        "gic_registers",
        "vcpus",
        "machine",
        "memory",
        "vm",
        "system_registers",
        "identity",
        "page_tables",
        "tables",
        "translations",
        "registers",
        "interrupts",
        "timer",
        "state",
        "emulation",
        "sme",
        "vcpu",
        "vcpu_registers",
        "vcpu_sme",
        "gic",
        "symbols",
        "macos",
        "control",
    ];

    /// Returns the names of the modules that `source` uses.
    fn used(source: &str) -> Vec<&str> {
        fn name(path: &str) -> &str {
            let end = path.find(|c: char| !(c.is_alphanumeric() || c == '_'));
            &path[..end.unwrap_or(path.len())]
        }
        let mut used = Vec::new();
        for (at, path) in source.match_indices("crate::") {
            let rest = &source[at + path.len()..];
            match rest.strip_prefix('{').and_then(|list| list.split_once('}')) {
                Some((list, _)) => used.extend(list.split(',').map(|item| name(item.trim()))),
                None => used.push(name(rest)),
            }
        }
        used.retain(|name| LAYERS.contains(name));
        used
    }

    #[test]
    fn modules_use_only_modules_of_lower_layers() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let layer = |name: &str| LAYERS.iter().position(|layer| *layer == name);
        let mut found = 0;
        for dir in ["", "emulation", "gic"] {
            for file in fs::read_dir(src.join(dir)).expect("the sources") {
                let path = file.expect("a file").path();
                if path.extension().is_none_or(|extension| extension != "rs") {
                    continue;
                }
                let module = if dir.is_empty() {
                    path.file_stem().and_then(|name| name.to_str())
                } else {
                    Some(dir)
                };
                let Some(own) = module.and_then(layer) else {
                    assert!(path.ends_with("lib.rs"), "{path:?} is in no layer");
                    continue;
                };
                let source = fs::read_to_string(&path).expect("a source file");
                for used in used(&source) {
                    let used_layer = layer(used).expect("a module");
                    assert!(used_layer <= own, "{path:?} uses {used}");
                    found += 1;
                }
            }
        }
        assert!(found > 50, "{found} uses were found");
    }
}
