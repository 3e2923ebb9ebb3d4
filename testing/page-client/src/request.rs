//! What a test asks a client to do.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The memory of a client.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Memory {
    /// The size in bytes of each region, in the order of the memory file.
    pub regions: Vec<u64>,
    /// Whether it consists of huge pages of hugetlbfs, of 2 MiB.
    pub huge: bool,
    /// Whether it is the RAM of a KVM guest.
    pub guest: bool,
    /// Whether it is registered with the userfaultfd.
    pub registered: bool,
}

impl Memory {
    /// Returns private anonymous memory.
    pub fn private(regions: impl IntoIterator<Item = u64>) -> Self {
        Self {
            regions: regions.into_iter().collect(),
            huge: false,
            guest: false,
            registered: true,
        }
    }
}

/// A message to the server.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Message {
    /// The bytes, in parts that are sent one after the other.
    pub parts: Vec<Vec<u8>>,
    /// The descriptors that are sent with a part: its number, and the descriptor.
    pub descriptors: Vec<(usize, Sent)>,
}

/// A descriptor that is sent.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub enum Sent {
    /// The client's userfaultfd.
    Userfaultfd,
    /// That of a file that is not a userfaultfd.
    Null,
}

/// Returns the JSON that lists these regions: the address and the size of each.
pub(crate) fn listed(regions: &[(u64, u64)], page_size: u64) -> String {
    let mut offset = 0;
    let regions = regions.iter().map(|(address, size)| {
        offset += size;
        serde_json::json!({
            "base_host_virt_addr": address,
            "size": size,
            "offset": offset - size,
            "page_size": page_size,
            "page_size_kib": page_size,
        })
    });
    serde_json::Value::from_iter(regions).to_string()
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) enum Request {
    Map(Memory),
    Connect(PathBuf),
    Send(Message),
    /// Closes the client's own copy of the userfaultfd.
    CloseDescriptor,
    /// Shuts down the connection.
    Disconnect,
    /// Reads the rest of what the server has sent.
    ReadNotice,
    Read {
        offset: u64,
        len: u64,
    },
    /// Writes a byte.
    Write {
        offset: u64,
        byte: u8,
    },
    /// Reads a byte of each page, with several threads.
    Touch {
        threads: u64,
        stride: u64,
    },
    /// Reads a byte of some pages that no other access has touched, and measures the time of each.
    Measure {
        first: u64,
        pages: u64,
        step: u64,
    },
    /// Discards pages.
    Remove {
        offset: u64,
        len: u64,
    },
    /// Reads all pages but the removed ones, with several threads in random order, while another
    /// one discards these.
    Churn {
        threads: u64,
        seed: u64,
        removed: Vec<Range<u64>>,
    },
    /// Runs a KVM guest that adds up its RAM.
    RunGuest,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) enum Answer {
    Done,
    /// The addresses of the regions.
    Addresses(Vec<u64>),
    /// Bytes follow.
    Bytes(u64),
    Number(u64),
    /// Nanoseconds.
    Times(Vec<u64>),
    /// The error of a system call.
    Errno(i32),
}
