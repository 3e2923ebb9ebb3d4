//! The commands in the guide of the page server serve a VMM: the page client in place of
//! Firecracker.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use page_client::{Client, Memory};
use support::server::Server;
use support::{RAM, RAMSNAP, Work};
use test_machine::needs;

const GUIDE: &str = "../../docs/guides/page-server.md";

/// Not a test: the process of the client.
#[test]
fn page_client() {
    page_client::run();
}

/// Returns the commands of the guide that serve, in their order.
fn commands() -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join(GUIDE);
    let page = fs::read_to_string(page).unwrap();
    let mut commands = Vec::new();
    for line in page.lines() {
        let service = line.strip_prefix("ExecStart=/usr/local/bin/ramsnap ");
        // In a sentence.
        let inline = line.split_once("`ramsnap ");
        let inline = inline.and_then(|(_, rest)| Some(rest.split_once('`')?.0));
        let command = line.strip_prefix("ramsnap ").or(service).or(inline);
        commands.extend(
            command
                .filter(|it| it.starts_with("serve "))
                .map(str::to_owned),
        );
    }
    commands
}

/// Replaces absolute paths by those of a directory, and creates the directories of files.
fn arguments(command: &str, dir: &Path) -> Vec<String> {
    let arguments = command.split_whitespace().map(|argument| match argument {
        path if path.starts_with('/') => {
            let path = dir.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path.display().to_string()
        }
        other => other.to_owned(),
    });
    arguments.collect()
}

/// Starts a command of the guide, and returns it with its socket.
fn start(work: &Work, command: &str) -> (Server, PathBuf) {
    let arguments = arguments(command, &work.path(""));
    let socket = arguments.iter().position(|argument| argument == "--socket");
    let mut ramsnap = Command::new(RAMSNAP);
    let socket = match socket {
        Some(at) => work.path(&arguments[at + 1]),
        // The service manager passes it.
        None => {
            let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 0</dev/null";
            ramsnap = Command::new("sh");
            ramsnap.args(["-c", script, RAMSNAP]);
            let socket = work.path("run/vm/service.sock");
            let listener = UnixListener::bind(&socket).unwrap();
            ramsnap.stdin(OwnedFd::from(listener));
            socket
        }
    };
    ramsnap.args(&arguments).current_dir(work.path(""));
    (Server::run(ramsnap, tempfile::tempdir().unwrap()), socket)
}

#[test]
fn commands_of_the_page_server_guide_serve_a_vmm() {
    needs!(Userfaultfd);
    let work = Work::with_chain();
    let [base, second] = ["first", "second"].map(|name| fs::read(work.path(name)).unwrap());
    fs::create_dir(work.path("vm")).unwrap();
    for (from, to) in [
        ("full.mem", "base.mem"),
        ("full.mem", "vm/base.mem"),
        ("d1.mem", "vm/d1.mem"),
    ] {
        fs::copy(work.path(from), work.path(to)).unwrap();
    }
    fs::copy(work.path("first"), work.path("full.mem")).unwrap();
    let commands = commands();
    assert_eq!(commands.len(), 6, "{commands:?}");
    for command in &commands {
        let (mut server, socket) = start(&work, command);
        let mut client = Client::spawn("page_client");
        client.map(&Memory::private([RAM]));
        client.connect(&socket);
        let expected = if command.contains("d1.mem") {
            &second
        } else {
            &base
        };
        assert!(client.read(0, RAM).unwrap() == *expected, "{command}");
        match command.contains("--once") {
            true => client.signal(Signal::SIGKILL),
            false => server.signal(Signal::SIGTERM),
        }
        assert_eq!(server.code(), Some(0), "{command}: {}", server.errors());
    }
    for written in ["base.set", "run/vm/pages.prom"] {
        assert!(work.path(written).exists(), "{written}");
    }
}
