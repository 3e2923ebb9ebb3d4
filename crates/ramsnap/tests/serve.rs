//! `ramsnap serve`: fills the RAM of a VMM in another process.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use page_client::{Client, Memory};
use support::server::{MIB, SIZE, Server, images, memory, named};
use support::{Ended, PAGE, RAMSNAP};
use test_images::Images;
use test_machine::needs;

/// Not a test: the process of the client.
#[test]
fn page_client() {
    page_client::run();
}

#[test]
fn vm_gets_all_of_its_ram_and_then_needs_no_server() {
    needs!(Userfaultfd);
    let images = images();
    let mut server = Server::start(&images, &["--once"]);
    let mode = fs::metadata(server.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = server.client(&memory());
    let line = server.line();
    let process = named(&client);
    assert!(
        line.starts_with(&format!("{process}: all RAM is filled")),
        "{line}"
    );
    assert_eq!((server.code(), server.errors().as_str()), (Some(0), ""));
    assert!(!server.socket().exists());
    client.close_descriptor();
    assert!(client.read(0, SIZE).unwrap() == images.ram);
}

#[test]
fn chain_of_packed_images_is_served() {
    needs!(Userfaultfd);
    let work = support::Work::with_chain();
    let ram = fs::read(work.path("ram")).unwrap();
    let files = ["full.mem", "d1.mem", "d2.mem"].map(|name| work.path(name));
    let files = [&files[0], &files[1], &files[2]].map(|path| path.to_str().unwrap());
    let server = Server::start_with(&files);
    for _ in 0..2 {
        let mut client = server.client(&memory());
        assert!(client.read(0, SIZE).unwrap() == ram);
    }
}

#[test]
fn signal_ends_the_server_once_all_ram_is_filled() {
    needs!(Userfaultfd);
    let images = images();
    let mut server = Server::start(&images, &["--no-prefetch"]);
    let mut clients = [server.client(&memory()), server.client(&memory())];
    for client in &mut clients {
        client.read(2 * MIB, 1).unwrap();
        client.close_descriptor();
    }
    server.signal(Signal::SIGTERM);
    assert_eq!(server.code(), Some(0), "{}", server.errors());
    for client in &mut clients {
        assert!(client.read(0, SIZE).unwrap() == images.ram);
    }
}

/// The signal comes before its connection is accepted.
#[test]
fn vm_that_waits_for_another_is_served_after_a_signal() {
    needs!(Userfaultfd);
    let images = images();
    let mut server = Server::start(&images, &["--no-prefetch", "--max-vms", "1"]);
    let mut clients = [server.client(&memory()), server.client(&memory())];
    clients[0].read(2 * MIB, 1).unwrap();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.code(), Some(0), "{}", server.errors());
    for client in &mut clients {
        client.close_descriptor();
        assert!(client.read(0, SIZE).unwrap() == images.ram);
    }
}

#[test]
fn signal_is_refused_by_option_while_a_vm_is_served() {
    needs!(Userfaultfd);
    let images = images();
    let mut server = Server::start(&images, &["--no-prefetch", "--on-signal", "refuse"]);
    let mut client = server.client(&memory());
    client.read(2 * MIB, 1).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        server.signal(signal);
        let line = server.error_line();
        assert!(line.contains("1 VM still being served"), "{line}");
    }
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    client.signal(Signal::SIGKILL);
    assert!(server.line().contains("exited"));
    server.signal(Signal::SIGTERM);
    // The signal may come before the VM is forgotten.
    while server.process.try_wait().unwrap().is_none() {
        std::thread::yield_now();
        server.signal(Signal::SIGTERM);
    }
    assert_eq!(server.code(), Some(0));
}

#[test]
fn refused_client_is_named_and_not_counted_as_failed() {
    needs!(Userfaultfd);
    let work = support::Work::empty();
    let metrics = work.path("metrics.prom");
    let options = ["--once", "--metrics", metrics.to_str().unwrap()];
    let mut server = Server::start(&images(), &options);
    // Less than the RAM of the images.
    let mut client = Client::spawn("page_client");
    client.map(&Memory::private([MIB]));
    let process = named(&client);
    client.connect_to_be_refused(&server.socket());
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
    assert_eq!(server.code(), Some(3));
    let errors = server.errors();
    let refused = format!("{process} was refused and killed: ");
    assert!(errors.contains(&refused), "{errors}");
    let text = fs::read_to_string(metrics).unwrap();
    let failed = "ramsnap_serve_ended_vms_total{end=\"failed\"} 0";
    for line in [failed, "ramsnap_serve_refused_clients_total 1"] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn metrics_that_cannot_be_written_are_an_error_at_start() {
    let work = support::Work::empty();
    let (images, socket) = (images(), work.path("pages.sock"));
    let mut command = Command::new(RAMSNAP);
    command
        .arg("serve")
        .arg(format!("raw:{}", images.path(0).display()))
        .arg("--socket")
        .arg(&socket)
        .arg("--metrics")
        .arg(work.path("missing/metrics.prom"));
    Ended::of(&mut command).fails(3, &["cannot write the metrics", "missing/metrics.prom"]);
    assert!(!socket.exists());
}

#[test]
fn fault_reads_as_many_pages_as_requested() {
    needs!(Userfaultfd);
    let work = support::Work::empty();
    let images = images();
    let metrics = work.path("metrics.prom");
    for (around, pages) in [("64", 16), ("4", 1)] {
        let options = [
            "--once",
            "--no-prefetch",
            "--metrics",
            metrics.to_str().unwrap(),
        ];
        let options = [&options[..], &["--fault-around", around]].concat();
        let mut server = Server::start(&images, &options);
        let mut client = server.client(&memory());
        client.read(2 * MIB, 1).unwrap();
        // Waits until the last page of them is filled.
        client.read(2 * MIB + (pages - 1) * PAGE, 1).unwrap();
        client.signal(Signal::SIGKILL);
        assert_eq!(server.code(), Some(0), "{}", server.errors());
        let text = fs::read_to_string(&metrics).unwrap();
        let line = "ramsnap_serve_filled_bytes_total{source=\"fault\"}";
        let line = format!("{line} {}\n", pages * PAGE);
        assert!(text.contains(&line), "{line}: {text}");
    }
}

#[test]
fn paths_that_are_in_use_are_not_replaced() {
    let work = support::Work::empty();
    let images = images();
    let full = format!("raw:{}", images.path(0).display());
    let serve = |socket: &Path| {
        let mut command = Command::new(RAMSNAP);
        command.arg("serve").arg(&full).arg("--socket").arg(socket);
        Ended::of(&mut command)
    };
    let file = work.path("file");
    fs::write(&file, b"data").unwrap();
    serve(&file).fails(2, &["is not a socket"]);
    assert_eq!(fs::read(&file).unwrap(), b"data");
    let used = work.path("used.sock");
    let _listener = UnixListener::bind(&used).unwrap();
    serve(&used).fails(3, &["another process listens"]);
    let none = Ended::of(Command::new(RAMSNAP).arg("serve").arg(&full));
    none.fails(2, &["--socket"]);
}

#[test]
fn socket_that_no_process_listens_on_is_replaced() {
    let images = images();
    let dir = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(dir.path().join("pages.sock")).unwrap());
    let mut command = Command::new(RAMSNAP);
    command
        .arg("serve")
        .arg(format!("raw:{}", images.path(0).display()));
    command.arg("--socket").arg(dir.path().join("pages.sock"));
    let mut server = Server::run(command, dir);
    server.signal(Signal::SIGINT);
    assert_eq!(server.code(), Some(0));
}

#[test]
fn service_manager_passes_the_socket_and_is_notified() {
    needs!(Userfaultfd);
    let images = images();
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("pages.sock")).unwrap();
    let notified = dir.path().join("notify.sock");
    let manager = UnixDatagram::bind(&notified).unwrap();
    let mut command = Command::new("sh");
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 0</dev/null";
    command.args(["-c", script, RAMSNAP, "serve"]);
    command.arg(format!("raw:{}", images.path(0).display()));
    command
        .env("NOTIFY_SOCKET", &notified)
        .stdin(OwnedFd::from(listener));
    let mut server = Server::run(command, dir);
    let mut state = [0; 100];
    let len = manager.recv(&mut state).unwrap();
    assert_eq!(state[..len], *b"READY=1");
    let mut client = server.client(&memory());
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.code(), Some(0), "{}", server.errors());
    // It is the manager's socket.
    assert!(server.socket().exists());
}

#[test]
fn touched_pages_are_recorded_and_filled_first() {
    needs!(Userfaultfd);
    let work = support::Work::empty();
    let images = images();
    let set = work.path("full.set");
    let set = set.to_str().unwrap();
    let mut server = Server::start(&images, &["--working-set", set, "--record", "--once"]);
    let mut client = server.client(&memory());
    for at in [7 * MIB, 2 * MIB] {
        client.read(at, 1).unwrap();
    }
    client.signal(Signal::SIGKILL);
    assert_eq!(server.code(), Some(0), "{}", server.errors());
    assert_eq!(fs::metadata(set).unwrap().len(), 24 + 2 * 16);

    let metrics = work.path("metrics.prom");
    let metrics = metrics.to_str().unwrap();
    let options = [
        "--working-set",
        set,
        "--prefetch",
        "--once",
        "--metrics",
        metrics,
    ];
    let mut server = Server::start(&images, &options);
    let mut client = server.client(&memory());
    assert_eq!(server.code(), Some(0), "{}", server.errors());
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    let text = fs::read_to_string(metrics).unwrap();
    for line in [
        "ramsnap_serve_ended_vms_total{end=\"filled\"} 1".to_owned(),
        format!(
            "ramsnap_serve_filled_bytes_total{{source=\"working_set\"}} {}",
            2 * PAGE
        ),
        format!(
            "ramsnap_serve_image_bytes_total{{image=\"{}\",layer=\"0\"}} {}",
            images.path(0).display(),
            1692 * PAGE
        ),
        "ramsnap_serve_refused_clients_total 0".to_owned(),
        format!(
            "ramsnap_serve_filled_bytes_total{{source=\"prefetch\"}} {}",
            1690 * PAGE
        ),
    ] {
        assert!(text.contains(&line), "{line}: {text}");
    }
}

/// Makes a packed image of which a byte is changed.
fn damaged(work: &support::Work, images: &Images) -> PathBuf {
    let packed = work.path("full.mem");
    let full = format!("raw:{}", images.path(0).display());
    Ended::of(
        Command::new(RAMSNAP)
            .args(["convert", &full, "--layout", "packed", "-o"])
            .arg(&packed),
    )
    .good();
    // A page of the header is followed by those of the RAM from 1 MiB on.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&packed)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4096 + 100).unwrap();
    file.write_all_at(&[!byte[0]], 4096 + 100).unwrap();
    packed
}

#[test]
fn damaged_pages_are_not_served() {
    needs!(Userfaultfd);
    let work = support::Work::empty();
    let images = images();
    let packed = damaged(&work, &images);
    let packed = packed.to_str().unwrap();
    let mut server = Server::start_with(&[packed, "--once"]);
    let mut client = server.client(&memory());
    assert_eq!(client.read(MIB, 1), Err(Errno::EFAULT));
    assert!(client.read(2 * MIB, MIB).unwrap() == images.ram[2 << 20..3 << 20]);
    assert_eq!(server.code(), Some(0));
    let errors = server.errors();
    assert!(
        errors.contains("poisoned pages") && errors.contains("damaged"),
        "{errors}"
    );
    assert_eq!(client.read(2 * MIB - 1, 1), Err(Errno::EFAULT));

    let mut server = Server::start_with(&[packed, "--once", "--on-damage", "fail"]);
    let mut client = server.client(&memory());
    let process = named(&client);
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
    assert_eq!(server.code(), Some(3));
    let errors = server.errors();
    let ended = format!("{process} can no longer be served and was killed: ");
    assert!(errors.contains(&ended), "{errors}");
}

/// It needs no permission for userfaultfd. It may not kill a VMM of another user.
#[test]
fn unprivileged_server_fills_the_ram_of_another_user() {
    needs!(Userfaultfd, Root);
    let images = images();
    let (dir, socket_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let [program, image] = ["ramsnap", "full.raw"].map(|name| dir.path().join(name));
    fs::copy(RAMSNAP, &program).unwrap();
    fs::copy(images.path(0), &image).unwrap();
    for path in [dir.path(), &program, &image] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    nix::unistd::chown(socket_dir.path(), Some(65_534.into()), None).unwrap();
    let command = |policy: &str| {
        let mut command = Command::new(&program);
        command.arg("serve").arg(format!("raw:{}", image.display()));
        command
            .arg("--socket")
            .arg(socket_dir.path().join("pages.sock"));
        command
            .args(["--on-failure", policy])
            .uid(65_534)
            .gid(65_534);
        command
    };
    let connect = |socket: &Path| {
        let mut client = Client::spawn("page_client");
        client.map(&memory());
        client.connect(socket);
        client
    };
    let socket = socket_dir.path().join("pages.sock");
    let mut server = Server::run(command("notify"), tempfile::tempdir().unwrap());
    let mut client = connect(&socket);
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.code(), Some(0), "{}", server.errors());

    let mut server = Server::run(command("kill"), tempfile::tempdir().unwrap());
    let client = connect(&socket);
    let refused = server.error_line();
    assert!(refused.contains("as the user of the VMM"), "{refused}");
    drop(client);
}

#[test]
fn kvm_guest_runs_on_served_ram() {
    needs!(Userfaultfd, Kvm);
    let images = images();
    let server = Server::start(&images, &[]);
    let mut memory = Memory::private([SIZE]);
    memory.guest = true;
    let mut client = server.client(&memory);
    let words = images.ram[MIB as usize..].as_chunks::<8>().0;
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    assert_eq!(client.run_guest(), words.fold(0, u64::wrapping_add));
}
