//! The io_uring of a child that is traced: its requests and their completions are read, and
//! changed, in the memory that it shares with the kernel.
//!
//! Offsets and numbers are those of Linux's `include/uapi/linux/io_uring.h`.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::calls::Kind;
use super::injected_fault::How;

/// What `mmap` of a ring's descriptor is asked for, as an offset.
const SUBMISSIONS: u64 = 0;
const COMPLETIONS: u64 = 0x800_0000;
const ENTRIES: u64 = 0x1000_0000;
/// Both rings lie in the first mapping.
const SINGLE_MMAP: u32 = 1;

const ENTRY: u64 = 64;
const COMPLETION: u64 = 16;
const NOP: u8 = 0;
const WRITE: u8 = 23;

/// A ring, once it is set up and mapped.
pub(super) struct Ring {
    memory: File,
    descriptor: u64,
    parameters: [u32; 30],
    submissions: u64,
    completions: u64,
    entries: u64,
    /// Requests that have been looked at, and completions.
    submitted: u32,
    completed: u32,
    in_flight: HashMap<u64, Request>,
}

/// A write that was handed over.
struct Request {
    /// Its number among the calls that the tracer knows.
    call: usize,
    answer: Option<Errno>,
}

/// What `io_uring_params` has where, in words.
mod word {
    pub(super) const FEATURES: usize = 5;
    pub(super) const SQ_HEAD: usize = 10;
    pub(super) const SQ_TAIL: usize = 11;
    pub(super) const SQ_MASK: usize = 12;
    pub(super) const SQ_ARRAY: usize = 16;
    pub(super) const CQ_TAIL: usize = 21;
    pub(super) const CQ_MASK: usize = 22;
    pub(super) const CQ_CQES: usize = 25;
}

impl Ring {
    /// What `io_uring_setup` made, with the parameters at this address.
    pub(super) fn set_up(pid: Pid, descriptor: u64, parameters: u64) -> io::Result<Self> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        let mut bytes = [0; 120];
        memory.read_exact_at(&mut bytes, parameters)?;
        let mut words = [0; 30];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_ne_bytes(*bytes);
        }
        Ok(Self {
            memory,
            descriptor,
            parameters: words,
            submissions: 0,
            completions: 0,
            entries: 0,
            submitted: 0,
            completed: 0,
            in_flight: HashMap::new(),
        })
    }

    pub(super) fn is(&self, descriptor: u64) -> bool {
        self.descriptor == descriptor
    }

    pub(super) fn mapped(&mut self, offset: u64, address: u64) {
        match offset {
            SUBMISSIONS => {
                self.submissions = address;
                if self.parameters[word::FEATURES] & SINGLE_MMAP != 0 {
                    self.completions = address;
                }
            }
            COMPLETIONS => self.completions = address,
            ENTRIES => self.entries = address,
            _ => {}
        }
    }

    /// The writes that are about to be handed over, and have not been before: where their entries
    /// are, and their bytes.
    pub(super) fn submitting(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let at = |word: usize| self.submissions + u64::from(self.parameters[word]);
        let tail = self.u32(at(word::SQ_TAIL))?;
        let mask = self.u32(at(word::SQ_MASK))?;
        let head = self.u32(at(word::SQ_HEAD))?;
        if self.submitted.wrapping_sub(head).cast_signed() < 0 {
            self.submitted = head;
        }
        let mut writes = Vec::new();
        while self.submitted != tail {
            let slot = at(word::SQ_ARRAY) + 4 * u64::from(self.submitted & mask);
            let entry = self.entries + ENTRY * u64::from(self.u32(slot)?);
            let mut opcode = [0];
            self.memory.read_exact_at(&mut opcode, entry)?;
            if opcode == [WRITE] {
                writes.push((entry, u64::from(self.u32(entry + 24)?)));
            }
            self.submitted = self.submitted.wrapping_add(1);
        }
        Ok(writes)
    }

    /// What the tracer calls the write at `entry`, and how it is to go wrong.
    pub(super) fn submit(&mut self, entry: u64, call: usize, how: Option<How>) -> io::Result<()> {
        let mut answer = None;
        match how {
            Some(How::Error(errno)) => {
                self.memory.write_all_at(&[NOP], entry)?;
                answer = Some(errno);
            }
            Some(How::Lost(errno)) => answer = Some(errno),
            Some(How::Short(bytes)) => {
                let bytes = u32::try_from(bytes).map_err(io::Error::other)?;
                self.memory.write_all_at(&bytes.to_ne_bytes(), entry + 24)?;
            }
            Some(How::Kill) | None => {}
        }
        let user_data = self.u64(entry + 32)?;
        self.in_flight.insert(user_data, Request { call, answer });
        Ok(())
    }

    /// What has completed since: the tracer's number of the call, and its result as the kernel gave
    /// it.
    pub(super) fn completing(&mut self) -> io::Result<Vec<(usize, i64)>> {
        let mut completed = Vec::new();
        if self.in_flight.is_empty() {
            return Ok(completed);
        }
        let at = |word: usize| self.completions + u64::from(self.parameters[word]);
        let (tail, mask) = (self.u32(at(word::CQ_TAIL))?, self.u32(at(word::CQ_MASK))?);
        while self.completed != tail {
            let completion = at(word::CQ_CQES) + COMPLETION * u64::from(self.completed & mask);
            let result = self.u32(completion + 8)?.cast_signed();
            // Others are of no write: the one by which a ring is tried out.
            if let Some(request) = self.in_flight.remove(&self.u64(completion)?) {
                completed.push((request.call, i64::from(result)));
                if let Some(errno) = request.answer.filter(|_| result >= 0) {
                    let answer = -(errno as i32);
                    self.memory
                        .write_all_at(&answer.to_ne_bytes(), completion + 8)?;
                }
            }
            self.completed = self.completed.wrapping_add(1);
        }
        Ok(completed)
    }

    /// As the table of calls has it: a completion is no call, but fails like one.
    pub(super) fn kind() -> &'static Kind {
        Kind::named("completion").expect("it is in the table")
    }

    fn u32(&self, address: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.memory.read_exact_at(&mut bytes, address)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn u64(&self, address: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, address)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}
