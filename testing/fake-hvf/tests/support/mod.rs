//! A machine with a guest, by the framework's C functions.

#![allow(
    dead_code,
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

pub(crate) mod translated;

use std::ffi::c_void;
use std::ptr;

pub(crate) use fake_hvf::control::turn;
use fake_hvf::*;

pub(crate) const PAGE: u64 = 16 << 10;
pub(crate) const RAM: u64 = 0x8000_0000;
pub(crate) const SIZE: u64 = 8 * PAGE;
pub(crate) const DATA: u64 = RAM + PAGE;
pub(crate) const ALL: u64 = 0b111;
pub(crate) const READ_AND_EXECUTE: u64 = 0b101;

pub(crate) const X0: u32 = 0;
pub(crate) const X1: u32 = 1;
pub(crate) const PC: u32 = 31;
pub(crate) const FPSR: u32 = 33;
pub(crate) const CPSR: u32 = 34;
pub(crate) const CPACR_EL1: u16 = 0xc082;
pub(crate) const VBAR_EL1: u16 = 0xc600;
pub(crate) const ELR_EL1: u16 = 0xc201;
pub(crate) const ESR_EL1: u16 = 0xc290;

/// Of a syndrome.
pub(crate) const DATA_ABORT: u64 = 0x24;
pub(crate) const INSTRUCTION_ABORT: u64 = 0x20;
pub(crate) const IL: u64 = 1 << 25;
pub(crate) const WRITE: u64 = 1 << 6;
pub(crate) const TRANSLATION: u64 = 0x07;
pub(crate) const PERMISSION: u64 = 0x0f;

/// Converts the return code of a call.
pub(crate) fn done(code: i32) -> Result<(), Code> {
    match code {
        0 => Ok(()),
        code => Err(Code(code)),
    }
}

/// Returns the value that a call writes.
pub(crate) fn got<T: Default>(call: impl FnOnce(*mut T) -> i32) -> Result<T, Code> {
    let mut value = T::default();
    done(call(&raw mut value)).map(|()| value)
}

/// A machine that ends when it is dropped.
pub(crate) struct Machine;

impl Machine {
    pub(crate) fn new() -> Self {
        Self::with_config(ptr::null_mut())
    }

    pub(crate) fn with_config(config: *mut c_void) -> Self {
        done(unsafe { hv_vm_create(config) }).unwrap();
        Self
    }

    /// Creates a machine with an interrupt controller.
    pub(crate) fn with_gic() -> Self {
        let machine = Self::new();
        let config = unsafe { hv_gic_config_create() };
        done(unsafe { hv_gic_config_set_distributor_base(config, 0x800_0000) }).unwrap();
        done(unsafe { hv_gic_config_set_redistributor_base(config, 0x1000_0000) }).unwrap();
        done(unsafe { hv_gic_create(config) }).unwrap();
        unsafe { os_release(config) };
        machine
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        assert_eq!(done(unsafe { hv_vm_destroy() }), Ok(()));
    }
}

/// Memory of the guest, which is unmapped when it is dropped.
pub(crate) struct Ram {
    host: usize,
    pub(crate) start: u64,
    pub(crate) size: u64,
}

impl Ram {
    pub(crate) fn new() -> Self {
        Self::at(RAM, ALL)
    }

    pub(crate) fn at(start: u64, flags: u64) -> Self {
        let host = got(|host: *mut usize| unsafe { hv_vm_allocate(host.cast(), SIZE as usize, 0) });
        let ram = Self {
            host: host.unwrap(),
            start,
            size: SIZE,
        };
        done(unsafe { hv_vm_map(ram.host(), start, SIZE as usize, flags) }).unwrap();
        ram
    }

    /// Returns the address in this process.
    pub(crate) fn host(&self) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.host)
    }

    /// Returns the address of a guest-physical address in this process.
    fn host_at<T>(&self, at: u64) -> *mut T {
        self.host()
            .wrapping_byte_add((at - self.start) as usize)
            .cast()
    }

    pub(crate) fn protect(&self, start: u64, size: u64, flags: u64) {
        done(unsafe { hv_vm_protect(start, size as usize, flags) }).unwrap();
    }

    pub(crate) fn write(&self, at: u64, code: &[u32]) {
        let to = self.host_at::<u32>(at);
        for (number, instruction) in code.iter().enumerate() {
            unsafe { to.add(number).write_volatile(*instruction) };
        }
    }

    pub(crate) fn write_word(&self, at: u64, value: u64) {
        unsafe { self.host_at::<u64>(at).write_volatile(value) };
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        unsafe { self.host_at::<u64>(at).read_volatile() }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        done(unsafe { hv_vm_unmap(self.start, self.size as usize) }).unwrap();
        done(unsafe { hv_vm_deallocate(self.host(), self.size as usize) }).unwrap();
    }
}

/// A vCPU, which is destroyed when it is dropped.
pub(crate) struct Vcpu {
    pub(crate) id: u64,
    exit: *const VcpuExit,
}

impl Vcpu {
    /// Creates a vCPU at the start of the RAM, at level 1 with interrupts masked.
    pub(crate) fn new() -> Self {
        let (mut id, mut exit) = (0, ptr::null());
        done(unsafe { hv_vcpu_create(&raw mut id, &raw mut exit, ptr::null_mut()) }).unwrap();
        let vcpu = Self { id, exit };
        vcpu.set(PC, RAM);
        vcpu.set(CPSR, 0x3c5);
        vcpu.set_system(CPACR_EL1, 0b11 << 20).unwrap();
        vcpu
    }

    /// Runs until an exit, which is an exception.
    pub(crate) fn run(&self) -> ExitException {
        let exit = self.run_any();
        assert_eq!(exit.reason, 1, "{exit:x?}");
        exit.exception
    }

    pub(crate) fn run_any(&self) -> VcpuExit {
        done(unsafe { hv_vcpu_run(self.id) }).unwrap();
        unsafe { self.exit.read_volatile() }
    }

    pub(crate) fn set(&self, register: u32, value: u64) {
        done(unsafe { hv_vcpu_set_reg(self.id, register, value) }).unwrap();
    }

    pub(crate) fn get(&self, register: u32) -> u64 {
        got(|value| unsafe { hv_vcpu_get_reg(self.id, register, value) }).unwrap()
    }

    pub(crate) fn set_system(&self, register: u16, value: u64) -> Result<(), Code> {
        done(unsafe { hv_vcpu_set_sys_reg(self.id, register, value) })
    }

    pub(crate) fn system(&self, register: u16) -> Result<u64, Code> {
        got(|value| unsafe { hv_vcpu_get_sys_reg(self.id, register, value) })
    }

    pub(crate) fn set_pending(&self, kind: u32, pending: bool) {
        done(unsafe { hv_vcpu_set_pending_interrupt(self.id, kind, pending) }).unwrap();
    }

    pub(crate) fn pending(&self, kind: u32) -> bool {
        got(|pending| unsafe { hv_vcpu_get_pending_interrupt(self.id, kind, pending) }).unwrap()
    }

    pub(crate) fn cancel(&self) {
        cancel(self.id);
    }
}

/// Makes a vCPU of any thread exit.
pub(crate) fn cancel(id: u64) {
    done(unsafe { hv_vcpus_exit(&raw const id, 1) }).unwrap();
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        done(unsafe { hv_vcpu_destroy(self.id) }).unwrap();
    }
}

/// Returns the class of an exception.
pub(crate) fn class(exception: ExitException) -> u64 {
    exception.syndrome >> 26
}

/// `hvc`
pub(crate) const fn hvc(number: u32) -> u32 {
    0xd400_0002 | number << 5
}

/// Returns the operand of the hypercall with which the vCPU exits.
pub(crate) fn hypercall(exception: ExitException) -> u64 {
    assert_eq!(class(exception), 0x16, "{exception:x?}");
    exception.syndrome & 0xffff
}
