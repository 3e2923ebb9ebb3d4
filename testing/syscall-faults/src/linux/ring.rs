//! The io_uring of a child that is traced: its requests and their completions are read, and
//! changed, in the memory that it shares with the kernel.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::FileExt as _;

use linux_raw_sys::io_uring::{
    IORING_FEAT_SINGLE_MMAP, IORING_OFF_CQ_RING, IORING_OFF_SQ_RING, IORING_OFF_SQES, io_uring_cqe,
    io_uring_op, io_uring_params, io_uring_sqe,
};
use nix::errno::Errno;
use nix::unistd::Pid;

use super::calls::Kind;
use super::injected_fault::How;

/// What `mmap` of a ring's descriptor is asked for, as an offset.
const SUBMISSIONS: u64 = IORING_OFF_SQ_RING as u64;
const COMPLETIONS: u64 = IORING_OFF_CQ_RING as u64;
const ENTRIES: u64 = IORING_OFF_SQES as u64;

const ENTRY: u64 = size_of::<io_uring_sqe>() as u64;
const ENTRY_LEN: u64 = offset_of!(io_uring_sqe, len) as u64;
const ENTRY_USER_DATA: u64 = offset_of!(io_uring_sqe, user_data) as u64;
const COMPLETION: u64 = size_of::<io_uring_cqe>() as u64;
const COMPLETION_RESULT: u64 = offset_of!(io_uring_cqe, res) as u64;
const NOP: u8 = io_uring_op::IORING_OP_NOP as u8;
const WRITE: u8 = io_uring_op::IORING_OP_WRITE as u8;
const PARAMETERS: usize = size_of::<io_uring_params>();

// Entries and completions have these sizes in rings without `IORING_SETUP_SQE128` and `CQE32`. The
// opcode is the first byte of an entry, and the number of a request the first word of its
// completion.
const _: () = assert!(ENTRY == 64 && COMPLETION == 16 && PARAMETERS == 120);
const _: () = assert!(offset_of!(io_uring_sqe, opcode) == 0);
const _: () = assert!(offset_of!(io_uring_cqe, user_data) == 0);

/// A ring, once it is set up and mapped.
pub(super) struct Ring {
    memory: File,
    descriptor: u64,
    parameters: [u32; PARAMETERS / 4],
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
    use super::{io_uring_params, offset_of};

    pub(super) const FEATURES: usize = offset_of!(io_uring_params, features) / 4;
    pub(super) const SQ_HEAD: usize = offset_of!(io_uring_params, sq_off.head) / 4;
    pub(super) const SQ_TAIL: usize = offset_of!(io_uring_params, sq_off.tail) / 4;
    pub(super) const SQ_MASK: usize = offset_of!(io_uring_params, sq_off.ring_mask) / 4;
    pub(super) const SQ_ARRAY: usize = offset_of!(io_uring_params, sq_off.array) / 4;
    pub(super) const CQ_TAIL: usize = offset_of!(io_uring_params, cq_off.tail) / 4;
    pub(super) const CQ_MASK: usize = offset_of!(io_uring_params, cq_off.ring_mask) / 4;
    pub(super) const CQ_CQES: usize = offset_of!(io_uring_params, cq_off.cqes) / 4;
}

impl Ring {
    /// What `io_uring_setup` made, with the parameters at this address.
    pub(super) fn set_up(pid: Pid, descriptor: u64, parameters: u64) -> io::Result<Self> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        let mut bytes = [0; PARAMETERS];
        memory.read_exact_at(&mut bytes, parameters)?;
        let mut words = [0; PARAMETERS / 4];
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
                if self.parameters[word::FEATURES] & IORING_FEAT_SINGLE_MMAP != 0 {
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
                writes.push((entry, u64::from(self.u32(entry + ENTRY_LEN)?)));
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
                self.memory
                    .write_all_at(&bytes.to_ne_bytes(), entry + ENTRY_LEN)?;
            }
            Some(How::Kill) | None => {}
        }
        let user_data = self.u64(entry + ENTRY_USER_DATA)?;
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
            let result = self.u32(completion + COMPLETION_RESULT)?.cast_signed();
            // Others are of no write: the one by which a ring is tried out.
            if let Some(request) = self.in_flight.remove(&self.u64(completion)?) {
                completed.push((request.call, i64::from(result)));
                if let Some(errno) = request.answer.filter(|_| result >= 0) {
                    let answer = -(errno as i32);
                    self.memory
                        .write_all_at(&answer.to_ne_bytes(), completion + COMPLETION_RESULT)?;
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
