//! A KVM guest that rewrites a part of its RAM at a steady rate.

#![allow(
    unsafe_code,
    reason = "SAFETY comments state why the program of the guest may be read"
)]

use std::arch::global_asm;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_backend::{GuestRam, MsrList, RamSlots, VcpuState, Vcpus, long_mode};
use kvm_ioctls::VcpuExit;
use live_snapshot::{Frozen, LiveSnapshot};
use page_reader::RamLayout;

/// The number of pages that the guest writes before it stops for a moment.
const BATCH: u64 = 64;
const PAGE: u64 = 4096;
/// The program, and its page tables.
const PROGRAM: u64 = 0x8000;
const PAGE_TABLES: u64 = 0x10_0000;
/// The first byte that the program writes.
const HOT: u64 = 2 << 20;

// Writes a number to every r10-th of r12 pages from rbx on, round and round, and stops after every
// r13 pages.
global_asm!(
    ".pushsection .rodata.bench_program, \"a\"",
    "bench_program:",
    "mov r14, r13",
    "2:",
    "mov rax, r8",
    "shl rax, 12",
    "inc r9",
    "mov [rbx + rax], r9",
    "add r8, r10",
    "cmp r8, r12",
    "jb 3f",
    "sub r8, r12",
    "3:",
    "dec r14",
    "jnz 2b",
    "out 0x80, al",
    "jmp bench_program",
    "bench_program_end:",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "bench_program"]
    static START: u8;
    #[link_name = "bench_program_end"]
    static END: u8;
}

fn program() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both labels are in one section, the second after the first, and only the read-only
    // program is between them.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The bytes that a guest rewrites in a second.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// These bytes, over and over.
    Hot(u64),
    /// Pages all over the RAM, no two neighbors in a row.
    Scattered(u64),
}

/// A point in time that was set on the thread of the vCPU.
pub struct Freeze {
    pub frozen: Frozen,
    /// From the last instruction of the guest before the pause to its next one.
    pub pause: Duration,
}

/// A guest that runs on a thread of its own.
pub struct Guest {
    pub ram: Arc<GuestRam>,
    state: Arc<State>,
    requests: Sender<(LiveSnapshot, Sender<Freeze>)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    /// Whether the guest rewrites its part of the RAM once a second, or as fast as it can.
    paced: AtomicBool,
    pages: AtomicU64,
}

impl Guest {
    /// Creates a guest of `size` bytes of RAM, all of which is written, that rewrites as many bytes
    /// as `work` states in a second.
    pub fn start(size: u64, work: Work) -> Self {
        let ram = Arc::new(GuestRam::new(RamLayout::single(0, size).unwrap()).unwrap());
        let random: Vec<u8> = (0..1 << 20)
            .map(|at: u64| ((at * at) >> 7) as u8 | 1)
            .collect();
        // Zeros below: a processor that does not grant I/O by its flags reads a permission bitmap
        // at address 0.
        for offset in (HOT..size).step_by(random.len()) {
            let rest = random.len().min((size - offset) as usize);
            ram.write_at(offset, &random[..rest]).unwrap();
        }
        let state = Arc::new(State::default());
        state.paced.store(true, SeqCst);
        let (requests, received) = channel();
        let (for_thread, ram_of_thread) = (Arc::clone(&state), Arc::clone(&ram));
        let thread = thread::spawn(move || run(&ram_of_thread, work, &for_thread, &received));
        Self {
            ram,
            state,
            requests,
            thread: Some(thread),
        }
    }

    /// Sets whether the guest rewrites its part of the RAM once a second, or as fast as it can.
    pub fn set_paced(&self, paced: bool) {
        self.state.paced.store(paced, SeqCst);
    }

    /// Returns the number of pages that the guest has written.
    pub fn pages(&self) -> u64 {
        self.state.pages.load(SeqCst)
    }

    /// Pauses the guest, captures its vCPU, sets the point in time, and resumes it.
    pub fn freeze(&self, live: LiveSnapshot) -> Freeze {
        let (answer, answered) = channel();
        self.requests.send((live, answer)).unwrap();
        answered.recv().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.state.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(
    ram: &Arc<GuestRam>,
    work: Work,
    state: &State,
    requests: &Receiver<(LiveSnapshot, Sender<Freeze>)>,
) {
    let kvm = kvm_backend::open_kvm().unwrap();
    let vm = kvm_backend::create_vm(&kvm).unwrap();
    let _slots = RamSlots::register(&vm, ram, 0).unwrap();
    let vcpus = Vcpus::new(&vm).unwrap();
    let mut vcpu = vcpus.create(&vm, 0).unwrap();
    let msrs = MsrList::query(&kvm).unwrap();
    ram.write(PROGRAM, program()).unwrap();
    let start = long_mode::Start {
        entry: PROGRAM,
        stack: PROGRAM,
        page_tables: PAGE_TABLES,
    };
    long_mode::boot(&kvm, ram, &vcpu, &start).unwrap();
    let mut registers = vcpu.get_regs().unwrap();
    (registers.rbx, registers.r8, registers.r9) = (HOT, 0, 1);
    let all = (ram.layout().ram_size() - HOT) / PAGE;
    let (pages, stride) = match work {
        Work::Hot(bytes) => (bytes / PAGE, 1),
        Work::Scattered(_) => (all, (all * 5 / 13) | 1),
    };
    (registers.r10, registers.r12, registers.r13) = (stride, pages, BATCH);
    vcpu.set_regs(&registers).unwrap();
    let (Work::Hot(bytes) | Work::Scattered(bytes)) = work;
    let batch = Duration::from_secs_f64((BATCH * PAGE) as f64 / bytes as f64);
    let mut due = Instant::now();
    while !state.stop.load(SeqCst) {
        let exit = match vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => continue,
            exit => exit.unwrap(),
        };
        assert!(matches!(exit, VcpuExit::IoOut(0x80, _)), "{exit:?}");
        let stopped = Instant::now();
        state.pages.fetch_add(BATCH, SeqCst);
        if let Ok((live, answer)) = requests.try_recv() {
            vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
            let paused = vcpus.pause().unwrap();
            let vcpu_state = VcpuState::capture(&msrs, &paused, &vcpu).unwrap();
            let mut frozen = live.freeze().unwrap();
            drop(paused);
            let pause = stopped.elapsed();
            frozen.set_metadata(vcpu_state.to_bytes()).unwrap();
            answer.send(Freeze { frozen, pause }).unwrap();
        }
        if state.paced.load(SeqCst) {
            // A guest that was slowed down does not catch up.
            due = (due + batch).max(stopped.checked_sub(batch * 4).unwrap_or(stopped));
            let early = due.saturating_duration_since(Instant::now());
            if early > Duration::from_micros(200) {
                thread::sleep(early);
            }
        }
    }
}
