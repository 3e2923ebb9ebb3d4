//! A guest that writes its RAM without end, and whose image shows whether it is consistent.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_backend::kvm_ioctls::VcpuExit;
use kvm_backend::page_reader::RamLayout;
use kvm_backend::{
    DirtyLog, GuestRam, MsrList, Paused, RamSlots, Vcpu, VcpuState, Vcpus, create_vm, long_mode,
    open_kvm,
};

/// The size of the RAM in bytes.
pub(crate) const RAM: u64 = 8 << 20;
pub(crate) const PAGE: u64 = 4096;
/// The program increments a byte of each page from here to the end of the RAM, and begins again.
const FIRST: u64 = 2 << 20;

/// inc byte ptr [rsp]; add rsp, 0x1000; cmp rsp, RAM; jb +7; mov rsp, FIRST; out 0x80, al; jmp back
#[rustfmt::skip]
const PROGRAM: [u8; 30] = [
    0xfe, 0x04, 0x24,
    0x48, 0x81, 0xc4, 0x00, 0x10, 0x00, 0x00,
    0x48, 0x81, 0xfc, 0x00, 0x00, 0x80, 0x00,
    0x72, 0x07,
    0x48, 0xc7, 0xc4, 0x00, 0x00, 0x20, 0x00,
    0xe6, 0x80,
    0xeb, 0xe2,
];

pub(crate) type AnyError = Box<dyn Error + Send + Sync>;

/// A guest with one vCPU, which a thread runs.
pub(crate) struct Guest {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) log: DirtyLog,
    msrs: MsrList,
    vcpus: Vcpus,
    vcpu: Arc<Mutex<Vcpu>>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

/// Requests to the thread of the vCPU.
struct Gate {
    pause: AtomicBool,
    end: AtomicBool,
    /// Reached by the thread once its vCPU has left the guest, and again before it returns.
    barrier: Barrier,
}

impl Guest {
    /// Creates the guest, starts its dirty log, and runs it.
    pub(crate) fn start() -> Result<Self, AnyError> {
        let kvm = open_kvm()?;
        let vm = create_vm(&kvm)?;
        let ram = Arc::new(GuestRam::new(RamLayout::single(0, RAM)?)?);
        let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
        let vcpus = Vcpus::new(&vm)?;
        let vcpu = vcpus.create(&vm, 0)?;
        ram.write(0x10000, &PROGRAM)?;
        let start = long_mode::Start {
            entry: 0x10000,
            stack: FIRST,
            page_tables: 0x1000,
        };
        long_mode::boot(&kvm, &ram, &vcpu, &start)?;
        let log = DirtyLog::start(&slots)?;
        let gate = Arc::new(Gate {
            pause: AtomicBool::new(false),
            end: AtomicBool::new(false),
            barrier: Barrier::new(2),
        });
        let vcpu = Arc::new(Mutex::new(vcpu));
        let thread = {
            let (vcpu, gate) = (Arc::clone(&vcpu), Arc::clone(&gate));
            thread::spawn(move || run(&vcpu, &gate))
        };
        Ok(Self {
            ram,
            log,
            msrs: MsrList::query(&kvm)?,
            vcpus,
            vcpu,
            gate,
            thread: Some(thread),
        })
    }

    /// Makes the vCPU leave the guest with its I/O completed, and pauses it.
    pub(crate) fn pause(&self) -> Result<Paused, AnyError> {
        // This guest exits all the time. Another needs a signal to the thread of each vCPU.
        self.gate.pause.store(true, Ordering::Release);
        self.gate.barrier.wait();
        Ok(self.vcpus.pause()?)
    }

    /// Captures the state of the paused vCPU.
    pub(crate) fn capture(&self, paused: &Paused) -> Result<VcpuState, AnyError> {
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(VcpuState::capture(&self.msrs, paused, &vcpu)?)
    }

    /// Lets the thread of the vCPU continue, if it is paused.
    pub(crate) fn resume(&self) {
        if self.gate.pause.swap(false, Ordering::AcqRel) {
            self.gate.barrier.wait();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.gate.end.store(true, Ordering::Release);
        self.resume();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(vcpu: &Mutex<Vcpu>, gate: &Gate) {
    while !gate.end.load(Ordering::Acquire) {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        if gate.pause.load(Ordering::Acquire) {
            let completed = vcpu.complete_io(|exit| panic!("another exit: {exit:?}"));
            drop(vcpu);
            // Without completed I/O, the pause fails.
            drop(completed);
            gate.barrier.wait(); // left
            gate.barrier.wait(); // resumed
            continue;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, _)) => {}
            Err(error) if error.errno() == EINTR => {}
            other => panic!("{other:?}"),
        }
    }
}

/// `EINTR` on every architecture of Linux.
const EINTR: i32 = 4;

/// Checks that the image is that of one moment: the pages before the next one were incremented once
/// more than the others.
pub(crate) fn check(image: &[u8], state: &VcpuState) -> Result<(), AnyError> {
    let count = |address: u64| image[address as usize];
    let laps = count(RAM - PAGE);
    for address in (FIRST..RAM).step_by(PAGE as usize) {
        let expected = laps.wrapping_add(u8::from(address < state.regs.rsp));
        if count(address) != expected {
            return Err(format!("the page at {address:#x} is of another moment").into());
        }
    }
    Ok(())
}
