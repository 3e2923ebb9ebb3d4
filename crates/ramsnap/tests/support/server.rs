//! A server, and a VMM that connects to it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use page_client::{Client, Memory};
use test_images::Images;

use super::{PAGE, RAMSNAP};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const SIZE: u64 = 8 * MIB;

/// A raw image with zeros in the lowest MiB.
pub(crate) fn images() -> Images {
    Images::new(SIZE, PAGE).with([256..1500, 1600..2048])
}

/// A ramsnap that serves.
pub(crate) struct Server {
    pub(crate) process: Child,
    out: BufReader<ChildStdout>,
    err: BufReader<ChildStderr>,
    dir: tempfile::TempDir,
}

impl Server {
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("pages.sock")
    }

    pub(crate) fn start(images: &Images, options: &[&str]) -> Self {
        let full = format!("raw:{}", images.path(0).display());
        Self::start_with(&[&[full.as_str()], options].concat())
    }

    /// Starts it, and waits until it listens.
    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(RAMSNAP);
        command
            .arg("serve")
            .arg("--socket")
            .arg(dir.path().join("pages.sock"));
        command.args(arguments);
        Self::run(command, dir)
    }

    pub(crate) fn run(mut command: Command, dir: tempfile::TempDir) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let err = BufReader::new(process.stderr.take().unwrap());
        let mut server = Self {
            process,
            out,
            err,
            dir,
        };
        let line = server.line();
        assert!(line.contains("of RAM"), "{line:?}: {}", server.errors());
        server
    }

    /// Returns the next line of stdout.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    /// Returns the next line of stderr.
    pub(crate) fn error_line(&mut self) -> String {
        let mut line = String::new();
        self.err.read_line(&mut line).unwrap();
        line
    }

    /// Waits for its end, and returns what it has printed to stderr.
    pub(crate) fn errors(&mut self) -> String {
        let mut text = String::new();
        self.err.read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id().cast_signed()), signal).unwrap();
    }

    pub(crate) fn code(&mut self) -> Option<i32> {
        self.process.wait().unwrap().code()
    }

    pub(crate) fn client(&self, memory: &Memory) -> Client {
        let mut client = Client::spawn("page_client");
        client.map(memory);
        client.connect(&self.socket());
        client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns how messages name the process of a client.
pub(crate) fn named(client: &Client) -> String {
    let command = fs::read_to_string(format!("/proc/{}/comm", client.id())).unwrap();
    format!("process {} ({})", client.id(), command.trim())
}

pub(crate) fn memory() -> Memory {
    Memory::private([3 * MIB, 5 * MIB])
}
