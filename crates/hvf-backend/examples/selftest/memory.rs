//! Stores to protected pages, and the memory behind a guest.

use std::sync::Arc;

use dirty_bitmap::{Policy, WriteProtection};
use hvf_backend::{Access, Exit, PAGE_SIZE, Register, Stage2, Vm};
use memory_image::MappedImage;
use memory_writer::{Layout, MemoryWriter};
use page_reader::PageReader;

use crate::guest::{
    DATA, HYPERCALL, PROGRAM, RAM, SIZE, hypercall, layout, machine, pc, ram, run_tracked, start,
};
use crate::report::{Measured, NotPassed, Outcome, Step, ensure};

pub(crate) const STEPS: [Step; 3] = [
    Step {
        name: "stores",
        shows: "each kind of store to a protected page exits as a write with its address, and is \
                repeated",
        run: stores,
    },
    Step {
        name: "code",
        shows: "the guest executes code that the host has replaced",
        run: code,
    },
    Step {
        name: "image",
        shows: "a guest that starts from a mapped image and the host see each other's writes, and \
                the image stays",
        run: image,
    },
];

/// The instructions store at x1. Those before the last are executed again after a fault.
const STORES: [(&str, &[u32]); 7] = [
    ("STR", &[0xf900_0020]),                            // str x0, [x1]
    ("STP", &[0xa900_0020]),                            // stp x0, x0, [x1]
    ("STR Q", &[0x3d80_0020]),                          // str q0, [x1]
    ("CAS", &[0xc8a3_7c20]),                            // cas x3, x0, [x1]
    ("LDADD", &[0xf820_0023]),                          // ldadd x0, x3, [x1]
    ("STXR", &[0xc85f_7c23, 0xc802_7c20, 0x35ff_ffc2]), // ldxr; stxr; cbnz
    ("DC ZVA", &[0xd50b_7421]),                         // dc zva, x1
];

fn stores(measured: &mut Measured) -> Outcome {
    let mut wrong = Vec::new();
    for (name, store) in STORES {
        let code: Vec<u32> = store.iter().copied().chain([HYPERCALL]).collect();
        let result = one_store(measured, name, &code);
        if let Err(NotPassed::Failed(reason) | NotPassed::Unsupported(reason)) = result {
            wrong.push(format!("{name}: {reason}"));
        }
    }
    ensure(wrong.is_empty(), || wrong.join("; "))
}

fn one_store(measured: &mut Measured, name: &str, code: &[u32]) -> Outcome {
    let (vm, stage2) = machine(&Vm::options(), code)?;
    let page = DATA - RAM..DATA - RAM + PAGE_SIZE;
    stage2.protect(page.clone())?;
    let mut vcpu = vm.create_vcpu()?;
    let address = DATA + 0x100;
    start(&vcpu, &[7, address])?;
    let exit = vcpu.run()?;
    let Exit::Exception(exception) = exit else {
        return Err(NotPassed::Failed(format!("no exception: {exit:x?}")));
    };
    measured.add_hex(format!("{name}: syndrome"), exception.syndrome);
    measured.add_hex(format!("{name}: address"), exception.physical_address);
    let access = Access::of(exception.syndrome);
    ensure(access == Some(Access::Write), || {
        format!(
            "the access is {access:?}, syndrome {:#x}",
            exception.syndrome
        )
    })?;
    let found = exception.physical_address / PAGE_SIZE;
    ensure(found == address / PAGE_SIZE, || {
        format!("the address is {:#x}", exception.physical_address)
    })?;
    let at = pc(&vcpu)?;
    let end = PROGRAM + 4 * (code.len() as u64 - 1);
    ensure((PROGRAM..end).contains(&at), || {
        format!("the program counter is {at:#x}")
    })?;
    stage2.unprotect(page)?;
    hypercall(vcpu.run()?)?;
    let mut word = [0xff; 8];
    stage2.ram().read_at(address - RAM, &mut word)?;
    let expected = match name {
        "STR Q" | "DC ZVA" => 0,
        _ => 7,
    };
    let found = u64::from_le_bytes(word);
    ensure(found == expected, || {
        format!("the memory has {found:#x} and not {expected:#x}")
    })
}

fn code(_: &mut Measured) -> Outcome {
    // mov x0, #1; hvc #0; b .-8
    let (vm, stage2) = machine(&Vm::options(), &[0xd280_0020, HYPERCALL, 0x17ff_fffe])?;
    let mut vcpu = vm.create_vcpu()?;
    start(&vcpu, &[])?;
    for number in 1..50_u32 {
        hypercall(vcpu.run()?)?;
        let found = vcpu.register(Register::X0)?;
        ensure(found == u64::from(number), || {
            format!("the guest executed code {found} and not {number}")
        })?;
        let replaced = 0xd280_0000 | (number + 1) << 5; // mov x0, #..
        stage2.ram().write(PROGRAM, &replaced.to_le_bytes())?;
        stage2.invalidate_instructions(PAGE_SIZE..PAGE_SIZE + 4)?;
    }
    Ok(())
}

fn image(measured: &mut Measured) -> Outcome {
    // ldr x0, [x1]; hvc #0; str x2, [x1]; hvc #0; b .-16
    let code = [0xf940_0020, HYPERCALL, 0xf900_0022, HYPERCALL, 0x17ff_fffc];
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("guest.mem");
    let original = ram(&code)?;
    original.write(DATA, &1_u64.to_le_bytes())?;
    let options = MemoryWriter::options().layout(Layout::Sealed);
    let mut writer = options.open(&path, SIZE, PAGE_SIZE)?;
    writer.write_full(&original)?;
    writer.commit()?;
    let before = std::fs::read(&path)?;

    let vm = Vm::new()?;
    let mapped = MappedImage::open(&path)?;
    let tracker = Stage2::start(&vm, layout()?, mapped, Policy::Pages)?;
    let ram = Arc::clone(tracker.protection().ram());
    let mut vcpu = vm.create_vcpu()?;
    start(&vcpu, &[0, DATA, 3])?;
    let host = || -> Result<u64, NotPassed> {
        let mut word = [0; 8];
        ram.read_at(DATA - RAM, &mut word)?;
        Ok(u64::from_le_bytes(word))
    };
    let mut seen = Vec::new();
    run_tracked(&mut vcpu, &tracker)?;
    seen.push(vcpu.register(Register::X0)?);
    ram.write(DATA, &2_u64.to_le_bytes())?; // replaces the page of the file in this process
    vcpu.set_register(Register::PC, PROGRAM)?;
    run_tracked(&mut vcpu, &tracker)?;
    seen.push(vcpu.register(Register::X0)?);
    let faults = run_tracked(&mut vcpu, &tracker)?;
    seen.push(host()?);
    measured.add("values in the order read", seen.clone());
    measured.add("write faults", faults);
    ensure(seen == [1, 2, 3], || {
        format!("the guest, the guest and the host read {seen:?} and not [1, 2, 3]")
    })?;
    let epoch = tracker.checkpoint()?;
    let dirty = epoch.bitmap().is_dirty(DATA - RAM)?;
    ensure(dirty, || "the write is not tracked".to_owned())?;
    ensure(std::fs::read(&path)? == before, || {
        "the image changed".to_owned()
    })
}
