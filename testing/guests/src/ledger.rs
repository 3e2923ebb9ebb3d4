//! The program of the guests: a ledger in pages of the guest's RAM, which can prove its own
//! integrity.
//!
//! This is the reference implementation. The embedded guests run it on real memory, the oracle runs
//! it on a map, and `kvm/ledger.s` is the same algorithm in machine code, register for variable.
//! All must produce the same digest.
//!
//! **A page** is 512 words of 8 bytes: its number, its version (how often it was written),
//! [`ENTRIES`] entries used in turn, and a checksum of all these. A page that was never written is
//! all zeros, and the checksum of zeros is zero.
//!
//! **A step** picks a page, verifies it, appends an entry derived from the step and the digest so
//! far, and updates the checksum. **The index**, elsewhere in RAM, repeats the version of every
//! page: a page from an older snapshot has a valid checksum, but not the version in the index.
//!
//! **The processor's registers** have state that is nowhere in RAM ([`Registers`]): a guest
//! restored without its vCPU state cannot produce the right digest.

/// The size of a ledger page in bytes: the smallest page of any tracker here.
pub const PAGE: u64 = 4096;
/// The size of a word in bytes, the unit of every access.
pub const WORD: u64 = 8;
/// The number of entries of a page: all words except number, version and checksum.
pub const ENTRIES: u64 = PAGE / WORD - 3;

/// Offsets of a page's words, in bytes.
pub const NUMBER: u64 = 0;
pub const VERSION: u64 = 8;
pub const ENTRY: u64 = 16;
pub const CHECKSUM: u64 = PAGE - WORD;

/// The number of pages that are written repeatedly: in 20 of 32 steps.
pub const HOT: u64 = 64;
/// One of this many roaming steps jumps to a random page.
pub const JUMP: u64 = 128;
/// The odd multiplier of `mix`: 2^64 divided by the golden ratio (Knuth, The Art of Computer
/// Programming 3, 6.4).
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// The first state of the random numbers; any number except 0.
pub const SEED: u64 = 0x0123_4567_89ab_cdef;
/// The value of [`front::FIRST_FAULT`] if no page was at fault.
pub const NO_PAGE: u64 = u64::MAX;

/// The places of the front page, the ledger and its index, as byte offsets into the RAM.
///
/// The first 2 MiB are reserved. They have the front page, through which guest and host
/// communicate, and in a virtual machine the page tables and the guest's program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The size of the RAM in bytes.
    pub ram: u64,
    /// The number of pages of the ledger.
    pub pages: u64,
}

impl Layout {
    /// The front page: the last page of the first 2 MiB.
    pub const FRONT: u64 = Self::LEDGER - PAGE;
    /// The first page of the ledger.
    pub const LEDGER: u64 = 2 << 20;
    /// The minimum size of the RAM, which has room for more than the hot pages.
    pub const MIN_RAM: u64 = 4 << 20;

    /// The maximum size of the RAM: its page tables fit below the guest's program.
    pub const MAX_RAM: u64 = 256 << 30;

    /// Returns the layout of `ram` bytes, a multiple of [`PAGE`] and at least [`Self::MIN_RAM`].
    pub const fn of(ram: u64) -> Self {
        let pages = (ram - Self::LEDGER) / PAGE;
        // An index page has the versions of as many ledger pages as it has words.
        let index = pages.div_ceil(PAGE / WORD + 1);
        Self {
            ram,
            pages: pages - index,
        }
    }

    /// Returns the offset of ledger page `number`.
    pub fn page(self, number: u64) -> u64 {
        Self::LEDGER + number * PAGE
    }

    /// Returns the offset of the index.
    pub fn index(self) -> u64 {
        self.page(self.pages)
    }
}

/// The words of the front page, as byte offsets into the RAM.
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    allow(
        dead_code,
        reason = "an embedded guest takes its commands as function calls"
    )
)]
pub mod front {
    use super::Layout;

    const fn word(number: u64) -> u64 {
        Layout::FRONT + number * super::WORD
    }

    /// Set by the host: the step at which to stop.
    pub const UNTIL: u64 = word(0);
    /// Set by the host: the command, 0 to work or 1 to check.
    pub const ORDER: u64 = word(1);
    /// Set by the host once: the end of the low RAM, and the size of the hole above it (the last
    /// address and 0 if there is no hole).
    pub const GAP_START: u64 = word(2);
    pub const GAP_SIZE: u64 = word(3);
    /// Set by the host once: the number of pages of the ledger.
    pub const PAGES: u64 = word(4);
    /// Set by the host once: the offset of the first page of the ledger in the whole RAM.
    pub const PLACE: u64 = word(5);

    /// State of the guest: the random numbers.
    pub const RANDOM: u64 = word(8);
    /// State of the guest: the page last written by the sequential steps.
    pub const CURSOR: u64 = word(9);
    /// State of the guest: the page last written by the roaming steps.
    pub const ROAMER: u64 = word(10);
    /// State of the guest: the number of steps done. A check compares it with the register.
    pub const STEPS: u64 = word(11);

    /// Result for the host: the number of pages found stale or torn, and the first of them.
    pub const FAULTS: u64 = word(16);
    pub const FIRST_FAULT: u64 = word(17);
    /// Result for the host after a check: the digest of registers, pages and index.
    pub const DIGEST: u64 = word(18);
}

/// Memory of the ledger: words at byte offsets into the RAM.
pub trait Words {
    /// Returns the word at `offset`.
    fn load(&self, offset: u64) -> u64;
    /// Replaces the word at `offset`.
    fn store(&mut self, offset: u64, word: u64);
}

/// The state that the guest keeps in processor registers only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Registers {
    /// The number of steps done.
    pub step: u64,
    /// The running digest.
    pub digest: u64,
    /// The sum of all entries. It is in a vector register, to cover the state of the FPU too.
    pub sum: u64,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The number of pages found stale or torn, while working or checking.
    pub faults: u64,
    /// The first of them.
    pub first_fault: u64,
    /// The digest of registers, pages and index.
    pub digest: u64,
}

/// Writes the initial state of the ledger, before the guest's first instruction.
pub fn prepare(memory: &mut impl Words, layout: Layout) {
    memory.store(front::PAGES, layout.pages);
    memory.store(front::PLACE, Layout::LEDGER);
    memory.store(front::GAP_START, u64::MAX);
    memory.store(front::RANDOM, SEED);
    memory.store(front::FIRST_FAULT, NO_PAGE);
}

/// Executes one step.
pub fn step(memory: &mut impl Words, layout: Layout, registers: &mut Registers) {
    registers.step += 1;
    let number = pick(memory, layout);
    let (page, index) = (layout.page(number), layout.index() + number * WORD);
    if !is_whole(memory, page, index, number, checksum(memory, page)) {
        fault(memory, number);
    }

    registers.digest = mix(mix(registers.digest, registers.step), number);
    let entry = registers.digest;
    registers.sum = registers.sum.wrapping_add(entry);

    let version = memory.load(page + VERSION) + 1;
    memory.store(page + NUMBER, number);
    memory.store(page + VERSION, version);
    memory.store(page + ENTRY + version % ENTRIES * WORD, entry);
    let sealed = checksum(memory, page);
    memory.store(page + CHECKSUM, sealed);
    memory.store(index, version);
    memory.store(front::STEPS, registers.step);
}

/// Checks the registers and the whole ledger.
pub fn check(memory: &mut impl Words, layout: Layout, registers: Registers) -> Verdict {
    let mut digest = mix(mix(registers.digest, registers.sum), registers.step);
    if memory.load(front::STEPS) != registers.step {
        fault(memory, NO_PAGE);
    }
    for number in 0..layout.pages {
        let (page, index) = (layout.page(number), layout.index() + number * WORD);
        let sum = checksum(memory, page);
        if !is_whole(memory, page, index, number, sum) {
            fault(memory, number);
        }
        digest = mix(mix(digest, sum), memory.load(index));
    }
    memory.store(front::DIGEST, digest);
    verdict(memory)
}

/// Returns the result that is in the front page after a check.
pub fn verdict(memory: &impl Words) -> Verdict {
    Verdict {
        faults: memory.load(front::FAULTS),
        first_fault: memory.load(front::FIRST_FAULT),
        digest: memory.load(front::DIGEST),
    }
}

/// Returns the page of the next step: a hot page, the next of a sequence, the next of a run that
/// began at a random page, or sometimes a random page.
fn pick(memory: &mut impl Words, layout: Layout) -> u64 {
    let random = xorshift(memory.load(front::RANDOM));
    memory.store(front::RANDOM, random);
    let anywhere = scale(random, layout.pages);
    match random & 31 {
        0..20 => scale(random, HOT),
        20..26 => advance(memory, front::CURSOR, layout),
        26..31 if (random >> 5).is_multiple_of(JUMP) => {
            memory.store(front::ROAMER, anywhere);
            anywhere
        }
        26..31 => advance(memory, front::ROAMER, layout),
        _ => anywhere,
    }
}

/// Advances the page number at `at`, from the last page to the first, and returns it.
fn advance(memory: &mut impl Words, at: u64, layout: Layout) -> u64 {
    let next = memory.load(at) + 1;
    let next = if next == layout.pages { 0 } else { next };
    memory.store(at, next);
    next
}

/// Returns the random number after `x` (Marsaglia, "Xorshift RNGs", Journal of Statistical Software
/// 8 (2003) 14).
fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// Scales the random number `x` to one below `n`.
fn scale(x: u64, n: u64) -> u64 {
    ((u128::from(x) * u128::from(n)) >> 64) as u64
}

/// Adds a word to a digest. For a given word this is one-to-one, so one changed word always changes
/// the result.
fn mix(digest: u64, word: u64) -> u64 {
    (digest.rotate_left(5) ^ word).wrapping_mul(GOLDEN)
}

/// Computes the checksum of the page at `page`.
fn checksum(memory: &impl Words, page: u64) -> u64 {
    (page..page + CHECKSUM)
        .step_by(WORD as usize)
        .fold(0, |sum, at| mix(sum, memory.load(at)))
}

/// Returns whether a page has its last contents: neither torn, nor stale, nor another page.
fn is_whole(memory: &impl Words, page: u64, index: u64, number: u64, checksum: u64) -> bool {
    let version = memory.load(page + VERSION);
    memory.load(page + CHECKSUM) == checksum
        && memory.load(index) == version
        && (version == 0 || memory.load(page + NUMBER) == number)
}

fn fault(memory: &mut impl Words, number: u64) {
    let faults = memory.load(front::FAULTS);
    if faults == 0 {
        memory.store(front::FIRST_FAULT, number);
    }
    memory.store(front::FAULTS, faults + 1);
}
