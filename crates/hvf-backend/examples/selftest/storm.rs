//! Several vCPUs that write while their pages are protected.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dirty_bitmap::{Policy, TakenBitmap};
use hvf_backend::{PAGE_SIZE, Register, Stage2, Stage2Tracker, Vm};
use page_reader::PageReader;

use crate::guest::{DATA, PROGRAM, SIZE, machine, run_tracked, start};
use crate::report::{Measured, NotPassed, Outcome, Step, ensure};

pub(crate) const STEPS: [Step; 1] = [Step {
    name: "storm",
    shows: "no write of four vCPUs is lost while their pages are protected and copied",
    run: storm,
}];

const VCPUS: u64 = 4;
/// The pages of each vCPU.
const PAGES: u64 = 128;
const PASSES: u64 = 8;
const CHECKPOINTS: u64 = 50;

/// Stores x0 to each of x3 pages, each x2 bytes after the last, in x4 passes.
const FILL: [u32; 10] = [
    0xaa01_03e5, // pass: mov x5, x1
    0xaa03_03e6, //       mov x6, x3
    0x9100_0400, //       add x0, x0, #1
    0xf900_00a0, // page: str x0, [x5]
    0x8b02_00a5, //       add x5, x5, x2
    0xf100_04c6, //       subs x6, x6, #1
    0x54ff_ffa1, //       b.ne page
    0xf100_0484, //       subs x4, x4, #1
    0x54ff_ff01, //       b.ne pass
    0xd400_0002, //       hvc #0
];

/// Fills the pages of vCPU `number` again and again. Returns the number of faults.
fn fill(
    vm: &Vm,
    tracker: &Stage2Tracker<Stage2>,
    number: u64,
    end: &AtomicBool,
) -> Result<u64, NotPassed> {
    let mut vcpu = vm.create_vcpu()?;
    let first = DATA + number * PAGE_SIZE;
    start(&vcpu, &[number << 32, first, VCPUS * PAGE_SIZE, PAGES])?;
    let mut faults = 0;
    while !end.load(Ordering::Relaxed) {
        vcpu.set_register(Register::PC, PROGRAM)?;
        vcpu.set_register(Register::X4, PASSES)?;
        faults += run_tracked(&mut vcpu, tracker)?;
    }
    Ok(faults)
}

fn storm(measured: &mut Measured) -> Outcome {
    let (vm, stage2) = machine(&Vm::options(), &FILL)?;
    let ram = Arc::clone(stage2.ram());
    let tracker = stage2.track(Policy::Pages)?;
    let mut image = vec![0; SIZE as usize];
    let mut copy = |taken: &TakenBitmap| -> Result<u64, NotPassed> {
        let mut pages = 0;
        for page in (0..SIZE).step_by(PAGE_SIZE as usize) {
            if taken.is_dirty(page)? {
                let end = (page + PAGE_SIZE) as usize;
                ram.read_at(page, &mut image[page as usize..end])?;
                pages += 1;
            }
        }
        Ok(pages)
    };
    let epoch = tracker.checkpoint()?;
    copy(epoch.bitmap())?;
    epoch.release()?;
    let mut pages = 0;
    let end = AtomicBool::new(false);
    let faults = thread::scope(|scope| {
        let (vm, tracker, end) = (&vm, &tracker, &end);
        let vcpu = |number| scope.spawn(move || fill(vm, tracker, number, end));
        let vcpus: Vec<_> = (0..VCPUS).map(vcpu).collect();
        let checkpoints = (0..CHECKPOINTS).try_for_each(|_| {
            let epoch = tracker.checkpoint_live()?;
            pages += copy(epoch.bitmap())?;
            Ok::<_, NotPassed>(epoch.release()?)
        });
        end.store(true, Ordering::Relaxed);
        let mut faults = 0;
        for vcpu in vcpus {
            let ended = vcpu.join();
            faults += ended.map_err(|_| NotPassed::Failed("a vCPU panicked".to_owned()))??;
        }
        checkpoints?;
        Ok::<_, NotPassed>(faults)
    })?;
    let epoch = tracker.checkpoint()?;
    pages += copy(epoch.bitmap())?;
    measured.add("checkpoints", CHECKPOINTS);
    measured.add("write faults", faults);
    measured.add("pages copied", pages);
    let mut page = vec![0; PAGE_SIZE as usize];
    let mut lost = 0_u64;
    for (offset, copied) in (0..)
        .step_by(PAGE_SIZE as usize)
        .zip(image.chunks(page.len()))
    {
        ram.read_at(offset, &mut page)?;
        lost += u64::from(page != copied);
    }
    measured.add("pages with lost writes", lost);
    ensure(lost == 0, || {
        format!("{lost} pages of the copies lack writes")
    })
}
