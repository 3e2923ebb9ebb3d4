//! Makes each call of the framework fail, one at a time: the error names the call, nothing panics
//! and nothing is left behind.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

#[cfg(feature = "macos-15")]
mod support;

use std::collections::BTreeSet;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use dirty_bitmap::{Policy, WriteProtection};
use fake_hvf::{Code, control};
use hvf_backend::el1::{self, Start};
use hvf_backend::{
    CreateVcpuError, CreateVmError, ExitAction, GuestRam, PAGE_SIZE, Register, Stage2, SysReg,
    Vcpu, VcpuState, Vm, VmOptions, has_hypervisor,
};
use page_reader::RamLayout;

type Done = Result<(), Box<dyn Error>>;

const LOW: u64 = 0x8000_0000;
const HIGH: u64 = LOW + (1 << 20);
const PROGRAM: u64 = LOW + PAGE_SIZE;

/// `str x0, [x1]; hvc #0`
const STORE: [u32; 2] = [0xf900_0020, 0xd400_0002];

/// The code of an injected failure: one with which the framework refuses nothing here.
const INJECTED: Code = Code::FAULT;

/// Calls whose failures are no error of a caller: they end something, in `drop`.
const WITHOUT_ERROR: [&str; 3] = ["hv_vcpu_destroy", "hv_vm_destroy", "hv_vm_unmap"];

/// Calls that do not return a code of the framework.
const OF_THE_SYSTEM: [&str; 2] = ["minherit", "sysctlbyname"];

/// Calls that return an object, and no code without it.
const OBJECTS: [&str; 3] = [
    "hv_gic_config_create",
    "hv_gic_state_create",
    "hv_vm_config_create",
];

#[cfg(feature = "macos-15")]
const MSIS: hvf_backend::MsiRegion = hvf_backend::MsiRegion {
    address: 0x900_0000,
    first_intid: 64,
    count: 8,
};

fn options() -> VmOptions {
    let options = Vm::options().sme(true);
    #[cfg(feature = "macos-13")]
    let options = options.address_bits(40);
    #[cfg(feature = "macos-15")]
    let options = options.gic(support::GIC).gic_msis(MSIS);
    #[cfg(feature = "macos-26")]
    let options = options.small_pages(true);
    options
}

/// Saves and restores a guest with RAM on both sides of a gap: every call that the crate makes.
fn save_and_restore() -> Done {
    let layout = RamLayout::new([(LOW, 4 * PAGE_SIZE), (HIGH, 2 * PAGE_SIZE)])?;
    drop(Vm::new()?);
    #[cfg(feature = "macos-15")]
    let _ = Vm::gic_sizes()?;
    let vm = options().create()?;
    let ram = Arc::new(GuestRam::new(layout)?);
    ram.write(LOW, &el1::page_table())?;
    ram.write(PROGRAM, &STORE.map(u32::to_le_bytes).concat())?;
    let tracker = Stage2::map(&vm, &ram)?.track(Policy::Pages)?;
    let mut vcpu = vm.create_vcpu()?;
    let start = Start {
        entry: PROGRAM,
        page_table: LOW,
        address_bits: 36,
    };
    let mut state = start.state();
    state.x[1] = HIGH;
    #[cfg(feature = "macos-15")]
    {
        state.gic_cpu = VcpuState::capture(&vcpu)?.gic_cpu;
    }
    let _ = state.restore(&vcpu, 0)?;
    tracker.checkpoint()?.release()?;
    loop {
        let run_guard = tracker.enter();
        let exit = vcpu.run()?;
        if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Forward {
            break;
        }
    }
    tracker.checkpoint()?.release()?;
    use_sme(&vcpu)?;
    let state = VcpuState::capture(&vcpu)?;
    #[cfg(feature = "macos-15")]
    {
        vm.set_spi(40, true)?;
        vm.send_msi(MSIS.doorbell(), MSIS.first_intid)?;
        vm.reset_gic()?;
    }
    #[cfg(feature = "macos-15")]
    let gic = vm.capture_gic()?;
    vcpu.canceller().cancel()?;
    let stage2 = tracker.stop()?;
    drop((vcpu, stage2, vm));

    let vm = options().create()?;
    let _stage2 = Stage2::map(&vm, &ram)?;
    let vcpu = vm.create_vcpu()?;
    vcpu.set_system_register(SysReg::MPIDR_EL1, 0x8000_0000)?;
    #[cfg(feature = "macos-15")]
    vm.restore_gic(&gic)?;
    let _ = state.restore(&vcpu, state.vtimer.resuming_offset())?;
    vcpu.set_register(Register::X0, 1)?;
    Ok(())
}

/// Enters streaming mode and enables ZA, as instructions of a guest would.
fn use_sme(vcpu: &Vcpu) -> Done {
    let modes = fake_hvf::SmeState {
        streaming_sve_mode_enabled: true,
        za_storage_enabled: true,
    };
    #[allow(unsafe_code)]
    // SAFETY: the vCPU exists and is of this thread.
    match unsafe { fake_hvf::hv_vcpu_set_sme_state(vcpu.id(), &raw const modes) } {
        0 => Ok(()),
        code => Err(format!("hv_vcpu_set_sme_state failed with HV_FAULT ({code:#x})").into()),
    }
}

/// Runs on a thread of its own, as a thread that has a vCPU after a failure can create no other.
fn on_own_thread(work: fn() -> Done) -> Result<(), String> {
    let texts = |error: Box<dyn Error>| {
        let mut texts = error.to_string();
        let mut next = error.source();
        while let Some(source) = next {
            texts += &format!("\n{source}");
            next = source.source();
        }
        texts
    };
    let thread = thread::spawn(move || work().map_err(texts));
    thread.join().expect("no panic")
}

/// Returns the calls of a run without failures, and how often each is made.
fn calls() -> Vec<(&'static str, u64)> {
    control::reset();
    on_own_thread(save_and_restore).unwrap();
    let counts = control::counts().into_iter().collect();
    control::reset();
    counts
}

/// Returns the names of the framework's functions in the code for macOS.
#[cfg(feature = "macos-26")]
fn called_functions() -> BTreeSet<String> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/src/macos");
    let mut names = BTreeSet::new();
    for file in std::fs::read_dir(dir).unwrap() {
        let source = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let code = source
            .lines()
            .filter(|line| !line.trim_start().starts_with(['/', '#']));
        for line in code {
            let words = line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            let calls = words.filter(|word| {
                word.starts_with("hv_") && !word.ends_with("_t") && !word.contains("support")
            });
            names.extend(calls.map(str::to_owned));
        }
    }
    names
}

#[cfg(feature = "macos-26")]
#[test]
fn the_scenario_makes_every_call_of_the_crate() {
    let _turn = control::turn();
    let made: BTreeSet<_> = calls().into_iter().map(|(name, _)| name.into()).collect();
    let missing: Vec<_> = called_functions().difference(&made).cloned().collect();
    assert_eq!(missing, [""; 0]);
}

#[test]
fn each_failing_call_is_an_error_that_names_it() {
    let _turn = control::turn();
    for (name, count) in calls() {
        if WITHOUT_ERROR.contains(&name) || OF_THE_SYSTEM.contains(&name) {
            continue;
        }
        for number in 1..=count {
            match name {
                // The tracker protects all of the RAM where a part of it is refused.
                "hv_vm_protect" => control::fail_from(name, number, INJECTED),
                _ => control::fail(name, number, INJECTED),
            }
            let what = format!("call {number} of {name}");
            let text = on_own_thread(save_and_restore).expect_err(&what);
            let code = format!("HV_FAULT ({:#x})", INJECTED.0);
            let of_code = text.contains(&code) || OBJECTS.contains(&name);
            let named = text.contains(name) && of_code;
            assert!(named, "{what}: {text}");
            assert_eq!(control::mapped(), [], "{what}");
            assert_eq!(control::objects(), 0, "{what}");
            assert!(!control::has_vcpu(), "{what}");
            control::reset();
        }
    }
}

#[test]
fn after_each_failing_call_a_machine_can_be_created() {
    let _turn = control::turn();
    for (name, count) in calls() {
        if WITHOUT_ERROR.contains(&name) {
            continue;
        }
        // The first and the last call: in both machines.
        for number in BTreeSet::from([1, count]) {
            control::fail(name, number, INJECTED);
            let _ = on_own_thread(save_and_restore);
            on_own_thread(save_and_restore).expect(name);
            control::reset();
        }
    }
}

#[test]
fn an_unreadable_sysctl_is_an_error() {
    let _turn = control::turn();
    control::reset();
    control::fail("sysctlbyname", 1, INJECTED);
    let error = Vm::new().unwrap_err();
    assert!(matches!(error, CreateVmError::Sysctl(_)), "{error:?}");
    control::reset();
}

#[test]
fn a_mac_without_hypervisor_is_an_error() {
    let _turn = control::turn();
    control::reset();
    control::set_hypervisor(false);
    assert!(!has_hypervisor().unwrap());
    let error = Vm::new().unwrap_err();
    assert!(matches!(error, CreateVmError::NoHypervisor), "{error:?}");
    control::reset();
}

#[test]
fn codes_for_creating_a_machine_are_distinguished() {
    let _turn = control::turn();
    let create = |code| {
        control::reset();
        control::fail("hv_vm_create", 1, code);
        let error = Vm::new().unwrap_err();
        control::reset();
        error
    };
    let (busy, denied) = (create(Code::BUSY), create(Code::DENIED));
    assert!(matches!(busy, CreateVmError::Exists(_)), "{busy:?}");
    assert!(
        matches!(denied, CreateVmError::NotEntitled(_)),
        "{denied:?}"
    );
    let unsupported = create(Code::UNSUPPORTED);
    let refused = matches!(unsupported, CreateVmError::Unsupported(_));
    assert!(refused, "{unsupported:?}");
    let unknown = create(Code(-1));
    let text = "hv_vm_create failed with an unknown error (0xffffffff)";
    assert!(matches!(unknown, CreateVmError::Refused(_)), "{unknown:?}");
    assert!(unknown.to_string().contains(text), "{unknown}");
}

fn mapped_machine() -> (Vm, Stage2) {
    control::reset();
    let vm = Vm::new().unwrap();
    let layout = RamLayout::new([(LOW, 4 * PAGE_SIZE), (HIGH, 2 * PAGE_SIZE)]).unwrap();
    let ram = Arc::new(GuestRam::new(layout).unwrap());
    let stage2 = Stage2::map(&vm, &ram).unwrap();
    (vm, stage2)
}

/// Returns whether all of a range of this process is mapped.
fn is_mapped(range: Range<usize>) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut end = range.start;
    for line in maps.lines() {
        let (place, _) = line.split_once(' ').unwrap();
        let (start, stop) = place.split_once('-').unwrap();
        let parse = |address| usize::from_str_radix(address, 16).unwrap();
        if (parse(start)..parse(stop)).contains(&end) {
            end = parse(stop);
        }
    }
    end >= range.end
}

#[test]
fn ram_that_stage_2_keeps_stays_mapped() {
    let _turn = control::turn();
    let (vm, stage2) = mapped_machine();
    control::fail("hv_vm_unmap", 2, INJECTED);
    drop((stage2, vm));
    let kept = control::mapped();
    assert_eq!(kept.len(), 1);
    let start = kept[0].host_start;
    assert_eq!(kept[0].guest_start, HIGH);
    assert!(is_mapped(start..start + kept[0].size as usize));
    let error = Vm::new().unwrap_err();
    assert!(matches!(error, CreateVmError::Exists(_)), "{error:?}");
    control::reset();
}

#[test]
fn ram_that_stage_2_releases_has_no_other_owner() {
    let _turn = control::turn();
    let (vm, stage2) = mapped_machine();
    let ram = Arc::clone(stage2.ram());
    drop((stage2, vm));
    assert_eq!(Arc::strong_count(&ram), 1);
}

#[test]
fn a_vcpu_that_stays_keeps_the_machine() {
    let _turn = control::turn();
    control::reset();
    control::fail("hv_vcpu_destroy", 1, INJECTED);
    on_own_thread(|| {
        let vm = Vm::new()?;
        drop(vm.create_vcpu()?);
        Ok(())
    })
    .unwrap();
    assert!(control::has_vcpu());
    let error = Vm::new().unwrap_err();
    assert!(matches!(error, CreateVmError::Exists(_)), "{error:?}");
    control::reset();
}

#[test]
fn a_machine_that_stays_is_an_error_for_the_next() {
    let _turn = control::turn();
    control::reset();
    control::fail("hv_vm_destroy", 1, INJECTED);
    drop(Vm::new().unwrap());
    let error = Vm::new().unwrap_err();
    assert!(matches!(error, CreateVmError::Exists(_)), "{error:?}");
    control::reset();
}

#[test]
fn protection_that_fails_names_the_range() {
    let _turn = control::turn();
    let (vm, stage2) = mapped_machine();
    control::fail("hv_vm_protect", 2, INJECTED);
    // The range crosses the gap: the part above it fails.
    let error = stage2.protect(0..6 * PAGE_SIZE).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("{HIGH:#x}")), "{text}");
    assert!(text.contains("hv_vm_protect"), "{text}");
    let error = stage2.protect(0..PAGE_SIZE / 2).unwrap_err();
    assert!(error.to_string().contains("align them"), "{error}");
    let error = stage2.protect(0..7 * PAGE_SIZE).unwrap_err();
    assert!(error.to_string().contains("RAM"), "{error}");
    drop((stage2, vm));
    control::reset();
}

#[test]
fn a_second_vcpu_of_a_thread_is_an_error() {
    let _turn = control::turn();
    control::reset();
    let vm = Vm::new().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let CreateVcpuError::Refused(error) = vm.create_vcpu().unwrap_err() else {
        panic!("another error");
    };
    assert_eq!((error.call, error.code), ("hv_vcpu_create", Code::BUSY.0));
    drop((vcpu, vm));
    control::reset();
}
