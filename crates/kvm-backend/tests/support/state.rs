//! Guests with state to capture.

use kvm_backend::{MsrList, VcpuState};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};

use super::Guest;

/// MSRs that a guest's kernel sets, with plausible values.
pub const MSRS: [(u32, u64); 6] = [
    (0x174, 0x10),                        // IA32_SYSENTER_CS
    (0x176, 0xffff_8000_0000_1230),       // IA32_SYSENTER_EIP
    (0x277, 0x0007_0106_0007_0106),       // IA32_PAT
    (0xc000_0081, 0x0023_0010_0000_0000), // IA32_STAR
    (0xc000_0082, 0xffff_8000_0000_4560), // IA32_LSTAR
    (0xc000_0102, 0x7fff_1234_5670),      // IA32_KERNEL_GS_BASE
];

pub fn with_devices(vm: &VmFd) {
    vm.create_irq_chip().unwrap();
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(pit).unwrap();
}

pub fn msrs(kvm: &Kvm) -> MsrList {
    MsrList::query(kvm).unwrap()
}

pub fn capture(guest: &mut Guest) -> VcpuState {
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    let paused = guest.vcpus.pause().unwrap();
    VcpuState::capture(&msrs(&guest.kvm), &paused, &guest.vcpu).unwrap()
}
