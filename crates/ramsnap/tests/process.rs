//! RAM in the memory of another process.

#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::vmm::{BESIDE, FILE, PROTECTED, SPLIT, Vmm};
use support::{Ended, PAGE, RAM, Work};
use test_machine::{FileSystem, LoopMount, Overlay, TinyTmpfs, needs};

/// Not a test: runs as the other process. See [`Vmm`].
#[test]
fn a_vmm() {
    support::vmm::run_as_vmm();
}

#[test]
fn ram_is_captured_from_a_process_by_name_address_or_range() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let (pid, address) = (vmm.pid(), &vmm.address);
    for (number, region) in [
        "/memfd:guest-ram".to_owned(),
        "guest-ram".to_owned(),
        address.clone(),
        format!("{address}:8MiB"),
        format!("{address}:0x800000"),
        format!("{}:8MiB", &address[2..]),
        format!("{address}-{:#x}", end_of(address)),
        format!("{}-{:x}", &address[2..], end_of(address)),
    ]
    .iter()
    .enumerate()
    {
        work.good(&format!(
            "dump --pid {pid} --region {region} -o {number}.mem"
        ));
        work.good(&format!("diff {number}.mem --ram ram"));
    }
    // Untouched RAM is neither touched nor saved.
    let info = work.good("info 0.mem full.mem --json").json();
    assert!(info[0]["present"]["bytes"].as_u64() <= Some(120 * PAGE));
    // The process runs again.
    assert!(!vmm.is_stopped());

    work.good(&format!(
        "dump --pid {pid} --region guest-ram --live -o live.mem"
    ));
    work.good("diff live.mem --ram ram");
}

#[test]
fn a_range_over_several_mappings_is_warned_of() {
    needs!(Ptrace);
    let work = Work::with_ram();
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(BESIDE, "1");
    });
    let (pid, address) = (vmm.pid(), &vmm.address);
    let middle = end_of(address);
    let dump = |size| format!("dump --pid {pid} --region {address}:{size} --live -o out --force");
    let dumped = work.good(&dump("12MiB")).warns(&[
        "spans 2 mappings",
        &format!("{address}..{middle:#x} (/memfd:guest-ram"),
        &format!("{middle:#x}..{:#x} (/memfd:another-file", middle + RAM),
    ]);
    assert_eq!(dumped.err.matches("spans").count(), 1, "{dumped:?}");
    for size in ["8MiB", "4MiB"] {
        let dumped = work.good(&dump(size));
        assert!(!dumped.err.contains("spans"), "{dumped:?}");
    }
}

fn end_of(address: &str) -> u64 {
    u64::from_str_radix(&address[2..], 16).unwrap() + RAM
}

#[test]
fn the_largest_mapping_is_named_exactly() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let (pid, ram) = (vmm.pid(), format!("{}:8MiB", vmm.address));
    // It may be the stack of a thread, which has the size of the RAM here.
    let dumped = work.good(&format!("dump --pid {pid} --region largest --live -o out"));
    let (_, named) = dumped.err.split_once("--region ").unwrap();
    let (named, _) = named.split_once(": ").unwrap();
    work.good(&format!(
        "dump --pid {pid} --region {named} --live -o again"
    ));
    let info = work.good("info out again --json").json();
    assert_eq!(info[0]["ram_bytes"], info[1]["ram_bytes"]);
    let (_, size) = named.rsplit_once(':').unwrap();
    assert!(size.ends_with('B'), "{size}");
    // Without --region, the message has what to give.
    let none = format!("dump --pid {pid} -o other");
    work.fails(&none, 2, &[&format!("--region {ram}: ")]);
    // For a mapping that is larger than the RAM, the message has the part at its start.
    work.create("half", RAM / 2);
    work.good("dump half -o half.mem");
    let part = format!("--region {}:4MiB", vmm.address);
    let diff = format!("diff half.mem --pid {pid} --region {ram} -o other");
    work.fails(&diff, 2, &[&ram, &part]);
    work.good(&format!("diff half.mem --pid {pid} {part} -o other"));
}

#[test]
fn a_diff_is_captured_from_a_process() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let pid = vmm.pid();
    work.good(&format!(
        "diff full.mem d1.mem --pid {pid} --region guest-ram -o mine.mem"
    ));
    work.good("verify full.mem d1.mem mine.mem");
    let info = work.good("info mine.mem d2.mem --json").json();
    assert_eq!(info[0]["present"], info[1]["present"]);
    work.good("restore full.mem d1.mem mine.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn missing_regions_are_named_and_the_process_resumes() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let pid = vmm.pid();
    let full = format!("dump --pid {pid} -o out");
    work.fails(&full, 2, &["--region", "guest-ram"]);
    work.fails(
        &format!("{full} --region other-ram"),
        2,
        &["other-ram", "guest-ram"],
    );
    work.fails(
        &format!("{full} --region 0x1000"),
        2,
        &["0x1000", "nothing mapped"],
    );
    work.fails(
        &format!("{full} --region 0x1000:1MiB"),
        2,
        &["0x1000", "nothing mapped"],
    );
    work.fails(&format!("{full} ram"), 2, &["once"]);
    work.fails("dump -o out", 2, &["name the guest's RAM"]);
    work.fails("dump ram --region guest-ram -o out", 2, &["--pid"]);
    let diff = format!("diff full.mem --ram ram --pid {pid} --region guest-ram -o out");
    work.fails(&diff, 2, &["once"]);
    assert!(!vmm.is_stopped());
    // The id of a process that has ended, which no other process has.
    drop(vmm);
    work.fails(&full, 3, &["does not exist"]);
}

#[test]
fn without_permission_to_trace_the_error_says_how_to_get_it() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    needs!(Root, Ptrace);
    let work = Work::with_ram();
    let vmm = Vmm::with(&work, "ram");
    let copied = Command::new("cp")
        .args([support::RAMSNAP, "ramsnap"])
        .current_dir(work.path(""))
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(work.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(work.path("ramsnap"));
    let full = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    command.args(full.split(' ')).current_dir(work.path(""));
    Ended::of(command.uid(65534).gid(65534)).fails(3, &["may trace", "CAP_SYS_PTRACE"]);
    assert_eq!(work.files(), ["ram", "ramsnap"]);
}

#[test]
fn a_file_that_the_process_has_as_ram_is_not_the_output() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let pid = vmm.pid();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let path = fds.map(|fd| fd.unwrap().path()).find(|fd| {
        let target = fs::read_link(fd).unwrap();
        target.to_string_lossy().contains("guest-ram")
    });
    let path = path.unwrap();
    for verb in ["dump", "diff full.mem"] {
        let command = format!(
            "{verb} --pid {pid} --region guest-ram --force -o {}",
            path.display()
        );
        work.fails(&command, 2, &["a link to an open file"]);
        // Nor is it a stream that text is written to.
        let verb = work.command(&format!("{verb} --pid {pid} --region guest-ram"));
        assert_refused_as_stream(verb, &path);
    }
    assert!(fs::read(&path).unwrap() == work.read("ram"));
}

fn assert_refused_as_stream(mut command: Command, ram: &Path) {
    let open = || fs::File::options().append(true).open(ram).unwrap();
    command.args(["-o", "out"]);
    Ended::of(command.stdout(open())).fails(2, &["stdout is the file", "guest-ram"]);
    command.stdout(std::process::Stdio::piped());
    let status = command.stderr(open()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

/// An overlay lists the mapping with another device than that of the file. The file has a second
/// device in the layer.
#[test]
fn a_file_on_an_overlay_that_is_mapped_as_ram_is_not_the_output() {
    needs!(Ptrace, Root);
    let work = Work::with_chain();
    let [below, above] = [64 << 20; 2].map(|size| TinyTmpfs::new(size).unwrap());
    let [upper, inside] = ["upper", "work"].map(|name| above.path().join(name));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&inside).unwrap();
    let overlay = Overlay::of(below.path(), &upper, &inside).unwrap();
    let ram = overlay.path().join("guest-ram");
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(FILE, &ram);
    });
    let pid = vmm.pid();
    for path in [&ram, &upper.join("guest-ram")] {
        let command = format!(
            "dump --pid {pid} --region guest-ram --force -o {}",
            path.display()
        );
        work.fails(&command, 2, &["one of the inputs"]);
        assert!(fs::read(path).unwrap() == work.read("ram"));
    }
}

/// On btrfs, mappings are listed with another device than files.
#[test]
fn a_file_on_btrfs_that_is_mapped_as_ram_is_not_the_output() {
    needs!(Ptrace, Root, Mount(FileSystem::BTRFS));
    let work = Work::with_chain();
    let disk = LoopMount::new(FileSystem::BTRFS).unwrap();
    let ram = disk.path().join("guest-ram");
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(FILE, &ram);
    });
    let (pid, address) = (vmm.pid(), vmm.address.clone());
    for region in ["guest-ram", &address] {
        let full = format!(
            "dump --pid {pid} --region {region} --force -o {}",
            ram.display()
        );
        work.fails(&full, 2, &["one of the inputs"]);
        assert!(fs::read(&ram).unwrap() == work.read("ram"));
    }
}

/// The kernel has a link to the file for each part of the mapping. The file has another name by
/// now.
#[test]
fn a_file_that_a_split_mapping_has_is_not_the_output() {
    needs!(Ptrace, Root, Mount(FileSystem::BTRFS));
    let work = Work::with_chain();
    let disk = LoopMount::new(FileSystem::BTRFS).unwrap();
    let [ram, link] = ["guest-ram", "link"].map(|name| disk.path().join(name));
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(FILE, &ram).env(SPLIT, "1");
    });
    fs::hard_link(&ram, &link).unwrap();
    fs::remove_file(&ram).unwrap();
    let (pid, address) = (vmm.pid(), vmm.address.clone());
    for region in ["guest-ram", &address] {
        let full = format!(
            "dump --pid {pid} --region {region} --force -o {}",
            link.display()
        );
        work.fails(&full, 2, &["one of the inputs"]);
        assert!(fs::read(&link).unwrap() == work.read("ram"));
    }
    // All parts are captured.
    work.good(&format!("dump --pid {pid} --region guest-ram -o out"));
    work.good("diff out --ram ram");
}

/// A VMM that protects pages splits the mapping of its RAM.
#[test]
fn an_address_in_a_part_of_the_ram_is_refused() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(PROTECTED, "1");
    });
    let (pid, address) = (vmm.pid(), &vmm.address);
    let whole = format!("{address}:8MiB");
    let part = format!("{address}:4MiB");
    let dump = format!("dump --pid {pid} --region {address} -o out");
    work.fails(&dump, 2, &[&whole, &part]);
    assert!(!work.path("out").exists());
    work.good(&format!("dump --pid {pid} --region {whole} -o out"));
    work.good("diff out --ram ram");
}

/// A restore may be writing to the file through a descriptor of another process.
#[test]
fn ram_whose_file_is_not_found_is_read_only_on_request() {
    needs!(Ptrace, Root);
    let work = Work::with_chain();
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(SPLIT, "1");
    });
    let file = "cannot open the file /memfd:guest-ram (deleted)";
    for verb in ["dump", "diff full.mem"] {
        let command = format!("{verb} --pid {} --region guest-ram -o out", vmm.pid());
        let before = work.files();
        let refused = Ended::of(support::vmm::without_links(&mut work.command(&command)));
        refused.fails(3, &[file, "run ramsnap as root", "add --unknown-file"]);
        assert_eq!(work.files(), before);
        assert!(!vmm.is_stopped());

        let permitted = format!("{command} --unknown-file");
        let warned = Ended::of(support::vmm::without_links(&mut work.command(&permitted))).good();
        assert!(warned.err.contains(file), "{}", warned.err);
        fs::rename(work.path("out"), work.path("copy")).unwrap();
        let found = work.good(&command);
        assert!(!found.err.contains(file), "{}", found.err);
        fs::remove_file(work.path("out")).unwrap();
        let chain = if verb == "dump" {
            "copy"
        } else {
            "full.mem copy"
        };
        work.good(&format!("diff {chain} --ram ram"));
    }
}

#[test]
fn memory_without_a_file_is_read_without_privilege() {
    needs!(Ptrace, Root);
    let work = Work::with_ram();
    let vmm = Vmm::with(&work, "ram");
    let dump = format!("dump --pid {} --region [heap] -o out", vmm.pid());
    let read = Ended::of(support::vmm::without_links(&mut work.command(&dump))).good();
    assert!(!read.err.contains("cannot open"), "{}", read.err);
}

/// Otherwise the image would contain the RAM twice.
#[test]
fn ram_that_is_named_twice_is_refused() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let (pid, address) = (vmm.pid(), &vmm.address);
    for (one, other) in [
        ("guest-ram", "guest-ram"),
        ("guest-ram", &**address),
        (&*format!("{address}:1MiB"), &*format!("{address}:4KiB")),
    ] {
        let full = format!("dump --pid {pid} --region {one} --region {other} -o out");
        work.fails(&full, 2, &["the same memory", "once"]);
    }
}

/// Reading a page of a memfd that was never touched would allocate it.
#[test]
fn capturing_a_process_gives_it_no_memory() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let resident = || {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).unwrap();
        let mut lines = smaps.lines().skip_while(|line| !line.contains("guest-ram"));
        let rss = lines.find_map(|line| line.strip_prefix("Rss:"));
        rss.unwrap().trim().to_owned()
    };
    let before = resident();
    let ram = format!("--pid {} --region guest-ram", vmm.pid());
    for layout in ["raw", "sealed", "packed"] {
        for zeros in ["", " --keep-zeros"] {
            work.good(&format!(
                "dump {ram} --layout {layout}{zeros} --force -o out"
            ));
            assert_eq!(resident(), before, "{layout}{zeros}");
        }
        work.good(&format!(
            "diff full.mem {ram} --layout {layout} --force -o out"
        ));
        assert_eq!(resident(), before, "{layout}");
    }
    work.good(&format!(
        "diff raw:first {ram} --page-size 64KiB --force -o out"
    ));
    assert_eq!(resident(), before);
}
