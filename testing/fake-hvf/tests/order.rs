//! Which calls are refused: on which thread, in which order, with which arguments.
#![cfg(all(hvf_fake, target_os = "linux", target_arch = "x86_64"))]
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::ptr;
use std::thread;

use fake_hvf::control::{self, System};
use fake_hvf::*;
use support::*;

#[test]
fn a_process_has_one_machine() {
    let _turn = turn();
    let machine = Machine::new();
    assert_eq!(
        done(unsafe { hv_vm_create(ptr::null_mut()) }),
        Err(Code::BUSY)
    );
    drop(machine);
    assert_eq!(done(unsafe { hv_vm_destroy() }), Err(Code::NO_DEVICE));
    let _machine = Machine::new();
}

#[test]
fn a_process_without_entitlement_has_none() {
    const NAME: &str = "a_process_without_entitlement_has_none";
    let _turn = turn();
    if std::env::var_os(control::NOT_ENTITLED).is_some() {
        assert_eq!(
            done(unsafe { hv_vm_create(ptr::null_mut()) }),
            Err(Code::DENIED)
        );
        return;
    }
    let mut test = Command::new(std::env::current_exe().unwrap());
    test.args(["--exact", NAME]).env(control::NOT_ENTITLED, "1");
    let output = test.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
fn a_thread_has_one_vcpu() {
    let _turn = turn();
    let _machine = Machine::new();
    let _vcpu = Vcpu::new();
    let (mut id, mut exit) = (0, ptr::null());
    let second = unsafe { hv_vcpu_create(&raw mut id, &raw mut exit, ptr::null_mut()) };
    assert_eq!(done(second), Err(Code::BUSY));
    thread::spawn(|| drop(Vcpu::new())).join().unwrap();
}

#[test]
fn a_vcpu_is_used_by_its_own_thread() {
    let _turn = turn();
    let _machine = Machine::new();
    let vcpu = Vcpu::new();
    let id = vcpu.id;
    let calls = move || {
        let mut value = 0;
        let value = &raw mut value;
        [
            unsafe { hv_vcpu_run(id) },
            unsafe { hv_vcpu_destroy(id) },
            unsafe { hv_vcpu_get_reg(id, X0, value) },
            unsafe { hv_vcpu_set_reg(id, X0, 0) },
            unsafe { hv_vcpu_get_sys_reg(id, VBAR_EL1, value) },
            unsafe { hv_vcpu_set_pending_interrupt(id, 0, true) },
            unsafe { hv_vcpu_set_vtimer_offset(id, 0) },
        ]
    };
    for code in thread::spawn(calls).join().unwrap() {
        assert_eq!(done(code), Err(Code::BAD_ARGUMENT));
    }
    // Except for the request to exit.
    let exit = move || unsafe { hv_vcpus_exit(&raw const id, 1) };
    assert_eq!(done(thread::spawn(exit).join().unwrap()), Ok(()));
    assert_eq!(vcpu.run_any().reason, 0);
    let unknown = 7;
    let exit = unsafe { hv_vcpus_exit(&raw const unknown, 1) };
    assert_eq!(done(exit), Err(Code::BAD_ARGUMENT));
}

#[test]
fn a_machine_ends_after_its_vcpus_and_memory() {
    let _turn = turn();
    let machine = Machine::new();
    let vcpu = Vcpu::new();
    assert_eq!(done(unsafe { hv_vm_destroy() }), Err(Code::BUSY));
    drop(vcpu);
    let ram = Ram::new();
    assert_eq!(done(unsafe { hv_vm_destroy() }), Err(Code::BUSY));
    let busy = unsafe { hv_vm_deallocate(ram.host(), SIZE as usize) };
    assert_eq!(done(busy), Err(Code::BUSY));
    drop(ram);
    drop(machine);
}

#[test]
fn ranges_are_whole_pages_of_stage_2() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let host = ram.host();
    let map = |host, start, size: u64, flags| {
        done(unsafe { hv_vm_map(host, start, size as usize, flags) })
    };
    let free = RAM + SIZE;
    assert_eq!(map(host, free + 4096, PAGE, ALL), Err(Code::BAD_ARGUMENT));
    assert_eq!(map(host, free, 4096, ALL), Err(Code::BAD_ARGUMENT));
    assert_eq!(map(host, free, 0, ALL), Err(Code::BAD_ARGUMENT));
    assert_eq!(map(host, free, PAGE, 8), Err(Code::BAD_ARGUMENT));
    assert_eq!(
        map(host.wrapping_byte_add(8), free, PAGE, ALL),
        Err(Code::BAD_ARGUMENT)
    );
    assert_eq!(map(host, 1 << 36, PAGE, ALL), Err(Code::BAD_ARGUMENT));
    assert_eq!(map(host, RAM, PAGE, ALL), Err(Code::ERROR));
    let protect =
        |start, size: u64| done(unsafe { hv_vm_protect(start, size as usize, READ_AND_EXECUTE) });
    assert_eq!(protect(RAM, 4096), Err(Code::BAD_ARGUMENT));
    assert_eq!(protect(RAM + 4096, PAGE), Err(Code::BAD_ARGUMENT));
    assert_eq!(protect(RAM, SIZE + PAGE), Err(Code::BAD_ARGUMENT));
    assert_eq!(protect(RAM, SIZE), Ok(()));
    let unmap = done(unsafe { hv_vm_unmap(RAM, PAGE as usize) });
    assert_eq!(unmap, Err(Code::BAD_ARGUMENT));
}

#[test]
fn a_machine_of_small_pages_has_smaller_ranges() {
    let _turn = turn();
    let config = unsafe { hv_vm_config_create() };
    done(unsafe { hv_vm_config_set_ipa_granule(config, 0) }).unwrap();
    let machine = Machine::with_config(config);
    unsafe { os_release(config) };
    let ram = Ram::new();
    assert_eq!(
        done(unsafe { hv_vm_protect(RAM + 4096, 4096, 0b101) }),
        Ok(())
    );
    drop((ram, machine));
    assert_eq!(control::objects(), 0);
}

#[test]
fn address_bits_are_limited_by_the_mac() {
    let _turn = turn();
    control::set_max_address_bits(39);
    assert_eq!(
        got(|bits| unsafe { hv_vm_config_get_max_ipa_size(bits) }),
        Ok(39)
    );
    let config = unsafe { hv_vm_config_create() };
    let set = |bits| done(unsafe { hv_vm_config_set_ipa_size(config, bits) });
    assert_eq!(set(40), Err(Code::UNSUPPORTED));
    assert_eq!(set(39), Ok(()));
    let machine = Machine::with_config(config);
    unsafe { os_release(config) };
    drop((Ram::at(1 << 38, ALL), machine));
}

#[test]
fn the_nth_call_fails_as_asked() {
    let _turn = turn();
    control::fail("hv_vm_create", 2, Code::FAULT);
    control::fail_from("hv_vm_get_max_vcpu_count", 1, Code::DENIED);
    drop(Machine::new());
    assert_eq!(
        done(unsafe { hv_vm_create(ptr::null_mut()) }),
        Err(Code::FAULT)
    );
    drop(Machine::new());
    for _ in 0..2 {
        let count = got(|count| unsafe { hv_vm_get_max_vcpu_count(count) });
        assert_eq!(count, Err(Code::DENIED));
    }
    assert_eq!(control::counts()["hv_vm_create"], 3);
    control::reset();
    assert_eq!(
        got(|count| unsafe { hv_vm_get_max_vcpu_count(count) }),
        Ok(16)
    );
}

#[test]
fn an_older_system_has_fewer_functions() {
    let _turn = turn();
    let finds = |name: &std::ffi::CStr| {
        !unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }.is_null()
    };
    let newest = [
        (System::MacOs13, c"hv_vm_config_get_max_ipa_size"),
        (System::MacOs15, c"hv_gic_create"),
        (System::MacOs15_2, c"hv_vcpu_get_sme_state"),
        (System::MacOs26, c"hv_vm_config_set_ipa_granule"),
    ];
    for (system, _) in newest {
        control::set_system(system);
        for (since, name) in newest {
            assert_eq!(finds(name), since <= system, "{name:?}, {system:?}");
        }
    }
    assert!(!finds(c"hv_no_such_function"));
    assert!(finds(c"getpid"));
    control::reset();
}

#[test]
fn the_host_has_pages_of_16_kib() {
    let _turn = turn();
    assert_eq!(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }, 16 << 10);
    assert!(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } > 0);
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    let kinds = [(libc::MAP_ANONYMOUS, -1), (0, file.as_raw_fd())];
    let sizes = [1, 4096, 5000, 1 << 20];
    for (size, (kind, file)) in sizes
        .into_iter()
        .flat_map(|size| kinds.map(|it| (size, it)))
    {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | kind;
        let start = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, file, 0) };
        assert!(start.addr().is_multiple_of(16 << 10), "{start:?}");
        unsafe { start.cast::<u8>().add(size - 1).write(1) };
        assert_eq!(unsafe { libc::munmap(start, size) }, 0);
    }
}
