//! Live snapshots of a guest of Apple's Hypervisor framework.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

use std::sync::Arc;
use std::thread;

use dirty_bitmap::Policy;
use fake_hvf::control;
use hvf_backend::el1::{self, Start};
use hvf_backend::{ExitAction, GuestRam, PAGE_SIZE, Stage2, Stage2Tracker, Vcpu, Vm};
use live_snapshot::{CopyOnWrite, LiveSnapshot, LiveStage2, LiveTracker, Method};
use memory_image::Chain;
use memory_writer::{Layout, MemoryWriter, Seal};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;

const RAM: u64 = 0x8000_0000;
const SIZE: u64 = 2 << 20;
const PROGRAM: u64 = RAM + PAGE_SIZE;
const DATA: u64 = RAM + 8 * PAGE_SIZE;

/// A guest that writes a number to the next one of 64 pages at each step.
struct Guest {
    vcpu: Vcpu,
    tracker: Arc<LiveStage2<Stage2>>,
    ram: Arc<GuestRam>,
}

impl Guest {
    fn new(vm: &Vm) -> Self {
        let layout = RamLayout::single(RAM, SIZE).unwrap();
        let ram = Arc::new(GuestRam::new(layout.clone()).unwrap());
        ram.write(RAM, &el1::page_table()).unwrap();
        // add x4, x1, x3, lsl #14; str x0, [x4]; add x0, x0, #1; add x3, x3, #1; and x3, x3, #63;
        // hvc #0; b to the first
        let code = [
            0x8b03_3824_u32,
            0xf900_0080,
            0x9100_0400,
            0x9100_0463,
            0x9240_1463,
            0xd400_0002,
            0x17ff_fffa,
        ];
        let code = code.map(u32::to_le_bytes);
        ram.write(PROGRAM, code.as_flattened()).unwrap();
        let stage2 = CopyOnWrite::new(Stage2::map(vm, &ram).unwrap());
        let tracker = Stage2Tracker::new(layout, ram.dirty_bitmap(), Policy::Pages, stage2);
        let tracker = LiveStage2::new(tracker.unwrap(), Arc::clone(&ram) as _);
        let vcpu = vm.create_vcpu().unwrap();
        let start = Start {
            entry: PROGRAM,
            page_table: RAM,
            address_bits: 36,
        };
        let mut state = start.state();
        (state.x[0], state.x[1], state.x[3]) = (1, DATA, 0);
        let _ = state.restore(&vcpu, 0).unwrap();
        Self {
            vcpu,
            tracker: Arc::new(tracker),
            ram,
        }
    }

    /// Runs the guest for some steps.
    fn work(&mut self, steps: u64) {
        let mut done = 0;
        while done < steps {
            let tracker = self.tracker.tracker();
            let run_guard = tracker.enter();
            let exit = self.vcpu.run().unwrap();
            if tracker.handle_exit(&run_guard, &exit).unwrap() == ExitAction::Forward {
                done += 1;
            }
        }
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.ram.read_at(0, &mut bytes).unwrap();
        bytes
    }
}

#[rstest]
fn image_is_the_ram_at_the_point_in_time(
    #[values(Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy)] method: Method,
) {
    let _turn = control::turn();
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::new().unwrap();
    let mut guest = Guest::new(&vm);
    let (mut parent, mut paths) = (None, Vec::new());
    for round in 0..4_u64 {
        guest.work(30);
        let path = dir.path().join(format!("{round}.mem"));
        let seal = parent.map_or_else(Seal::new, |parent| Seal::new().parent(parent));
        let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
        let writer = options.open(&path, SIZE, PAGE_SIZE).unwrap();
        parent = writer.image_id();
        paths.push(path);
        let options = LiveSnapshot::options().method(method).diff(round > 0);
        let live = options.begin(&guest.tracker, writer).unwrap();
        guest.work(20); // while it is prepared
        let ram = guest.contents();
        let frozen = live.freeze().unwrap();
        guest.work(40); // before a page is written
        let background = thread::spawn(move || frozen.commit().unwrap());
        guest.work(100); // while pages are written
        let report = background.join().unwrap();
        let copies = method != Method::StopAndCopy;
        assert_eq!(report.copied_before_write > 0, copies, "{report:?}");
        let chain = Chain::open_sealed(&paths).unwrap();
        let mut image = vec![0; SIZE as usize];
        chain.read(0, &mut image).unwrap();
        assert!(image == ram, "{method}, round {round}");
    }
}

#[test]
fn host_write_that_is_announced_keeps_the_old_page_for_the_image() {
    let _turn = control::turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    let vm = Vm::new().unwrap();
    let mut guest = Guest::new(&vm);
    guest.work(64);
    let options = MemoryWriter::options().layout(Layout::Packed);
    let writer = options.open(&path, SIZE, PAGE_SIZE).unwrap();
    let live = LiveSnapshot::options()
        .begin(&guest.tracker, writer)
        .unwrap();
    let ram = guest.contents();
    let frozen = live.freeze().unwrap();
    let offset = DATA - RAM;
    let slot = guest.tracker.slot().unwrap();
    slot.before_write(offset..offset + 4);
    guest.ram.write(DATA, &[9; 4]).unwrap();
    frozen.commit().unwrap();
    let mut image = vec![0; SIZE as usize];
    Chain::open_sealed(&[path])
        .unwrap()
        .read(0, &mut image)
        .unwrap();
    assert!(image == ram);
    // `GuestRam` marks its own writes.
    assert!(guest.ram.dirty_bitmap().is_dirty(offset).unwrap());
}

#[test]
fn freeze_of_a_running_guest_is_refused() {
    let _turn = control::turn();
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::new().unwrap();
    let guest = Guest::new(&vm);
    let writer = MemoryWriter::open(dir.path().join("full.mem"), SIZE, PAGE_SIZE).unwrap();
    let live = LiveSnapshot::options()
        .begin(&guest.tracker, writer)
        .unwrap();
    let tracker = guest.tracker.tracker();
    let running = tracker.enter();
    assert!(live.freeze().is_err());
    drop(running);
    assert!(guest.ram.dirty_bitmap().is_dirty(0).unwrap());
}
