//! The client, as the test that has started it sees it.

use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::child::VARIABLE;
use crate::request::{Answer, Memory, Message, Request, Sent, listed};

/// A process that behaves as a VMM does. It is killed when this is dropped.
#[derive(Debug)]
pub struct Client {
    process: Child,
    requests: BufReader<UnixStream>,
    memory: Vec<(u64, u64)>,
    page_size: u64,
}

impl Client {
    /// Starts this program again, as its test `test`, which calls [`run`](crate::run). A program
    /// without tests calls it first in `main`.
    #[must_use]
    pub fn spawn(test: &str) -> Self {
        let (here, there) = UnixStream::pair().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(VARIABLE, "1")
            .stdin(OwnedFd::from(there))
            .stdout(Stdio::null())
            .spawn();
        Self {
            process: process.unwrap(),
            requests: BufReader::new(here),
            memory: Vec::new(),
            page_size: 4096,
        }
    }

    /// Returns the id of the process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Maps memory, and registers it with a userfaultfd.
    pub fn map(&mut self, memory: &Memory) {
        let Answer::Addresses(addresses) = self.ask(&Request::Map(memory.clone())) else {
            panic!("the client has not mapped its memory");
        };
        self.page_size = if memory.huge { 2 << 20 } else { 4096 };
        self.memory = addresses.into_iter().zip(memory.regions.clone()).collect();
    }

    /// Connects to a server and sends the regions and the userfaultfd at once, as Firecracker does.
    pub fn connect(&mut self, socket: &Path) {
        self.open(socket);
        let message = self.message();
        self.send(&message);
    }

    /// Connects to a server, and sends it all that it needs. The server may end the process.
    pub fn connect_to_be_refused(&mut self, socket: &Path) {
        self.open(socket);
        let message = self.message();
        self.request(&Request::Send(message));
    }

    /// Connects to a server, and sends nothing.
    pub fn open(&mut self, socket: &Path) {
        self.done(&Request::Connect(socket.to_owned()));
    }

    /// Returns the JSON that lists the regions.
    #[must_use]
    pub fn listed(&self) -> String {
        listed(&self.memory, self.page_size)
    }

    /// Returns the message of [`connect`](Self::connect).
    #[must_use]
    pub fn message(&self) -> Message {
        Message {
            parts: vec![self.listed().into_bytes()],
            descriptors: vec![(0, Sent::Userfaultfd)],
        }
    }

    /// Sends a message over the open connection.
    pub fn send(&mut self, message: &Message) {
        self.done(&Request::Send(message.clone()));
    }

    /// Closes the client's copy of the userfaultfd, so that only the server has one.
    pub fn close_descriptor(&mut self) {
        self.done(&Request::CloseDescriptor);
    }

    /// Shuts the connection down.
    pub fn disconnect(&mut self) {
        self.done(&Request::Disconnect);
    }

    /// Returns what the server writes until it shuts the connection down.
    pub fn read_notice(&mut self) -> String {
        let notice = self.bytes(&Request::ReadNotice).unwrap();
        String::from_utf8(notice).unwrap()
    }

    /// Reads memory by system calls.
    ///
    /// # Errors
    /// Returns `EFAULT` for memory that is poisoned.
    pub fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        self.bytes(&Request::Read { offset, len })
    }

    /// Reads memory without waiting for the result, which [`answered`](Self::answered) takes.
    pub fn begin_read(&mut self, offset: u64, len: u64) {
        self.request(&Request::Read { offset, len });
    }

    /// Returns the bytes of a read that was begun.
    ///
    /// # Errors
    /// Returns the errors of [`read`](Self::read).
    pub fn answered(&mut self) -> Result<Vec<u8>, Errno> {
        self.bytes_of_answer()
    }

    /// Writes a byte by an instruction.
    pub fn write(&mut self, offset: u64, byte: u8) {
        self.done(&Request::Write { offset, byte });
    }

    /// Reads the first byte of every `stride` bytes, with several threads. Returns the sum.
    pub fn touch(&mut self, threads: u64, stride: u64) -> u64 {
        self.number(&Request::Touch { threads, stride })
    }

    /// Reads a byte of `pages` pages, from the page `first` on, each `step` pages after the one
    /// before. Returns the time of each read in nanoseconds.
    pub fn measure(&mut self, first: u64, pages: u64, step: u64) -> Vec<u64> {
        match self.ask(&Request::Measure { first, pages, step }) {
            Answer::Times(times) => times,
            answer => panic!("{answer:?}"),
        }
    }

    /// Discards memory, as a balloon does.
    pub fn remove(&mut self, offset: u64, len: u64) {
        self.done(&Request::Remove { offset, len });
    }

    /// Reads all pages but the removed ones, with several threads in random order, while another
    /// thread discards these, as a balloon does. Returns the bytes, zeros for the removed pages.
    ///
    /// # Errors
    /// Returns `EFAULT` if memory is poisoned.
    pub fn churn(
        &mut self,
        threads: u64,
        seed: u64,
        removed: &[Range<u64>],
    ) -> Result<Vec<u8>, Errno> {
        self.begin_churn(threads, seed, removed);
        self.answered()
    }

    /// Begins a [`churn`](Self::churn), whose bytes [`answered`](Self::answered) returns.
    pub fn begin_churn(&mut self, threads: u64, seed: u64, removed: &[Range<u64>]) {
        self.request(&Request::Churn {
            threads,
            seed,
            removed: removed.to_vec(),
        });
    }

    /// Runs a KVM guest that adds up the words of its RAM from 1 MiB on.
    pub fn run_guest(&mut self) -> u64 {
        self.number(&Request::RunGuest)
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id().cast_signed()), signal).unwrap();
    }

    /// Waits until the process has ended. Returns the signal that ended it, if one did.
    pub fn ended_by(&mut self) -> Option<i32> {
        let status: ExitStatus = self.process.wait().unwrap();
        status.signal()
    }

    /// Returns whether the process still runs.
    pub fn runs(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    fn request(&mut self, request: &Request) {
        let line = serde_json::to_string(request).unwrap();
        let stream = self.requests.get_mut();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn answer(&mut self) -> Answer {
        let mut line = String::new();
        self.requests.read_line(&mut line).unwrap();
        serde_json::from_str(&line).expect("the client has ended without an answer")
    }

    fn ask(&mut self, request: &Request) -> Answer {
        self.request(request);
        self.answer()
    }

    fn done(&mut self, request: &Request) {
        let answer = self.ask(request);
        assert!(matches!(answer, Answer::Done), "{request:?}: {answer:?}");
    }

    fn number(&mut self, request: &Request) -> u64 {
        match self.ask(request) {
            Answer::Number(number) => number,
            answer => panic!("{request:?}: {answer:?}"),
        }
    }

    fn bytes(&mut self, request: &Request) -> Result<Vec<u8>, Errno> {
        self.request(request);
        self.bytes_of_answer()
    }

    fn bytes_of_answer(&mut self) -> Result<Vec<u8>, Errno> {
        match self.answer() {
            Answer::Bytes(len) => {
                let mut bytes = vec![0; len as usize];
                self.requests.read_exact(&mut bytes).unwrap();
                Ok(bytes)
            }
            Answer::Errno(errno) => Err(Errno::from_raw(errno)),
            answer => panic!("{answer:?}"),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
