//! The guest's work: a ledger, kept page by page in the guest's RAM, that can prove its own
//! integrity.
//!
//! This is the reference. The embedded guests run it over real memory, the oracle runs it over a
//! map, and `kvm/ledger.s` is the same algorithm in machine code, register for variable. All must
//! reach one digest.
//!
//! **A page** is 512 words of 8 bytes: its number, its version (how often it was written),
//! [`ENTRIES`] entries used in turn, and a checksum over all that. A page never written is all
//! zeros, and the checksum of zeros is zero.
//!
//! **A step** picks a page, proves it whole, appends an entry derived from the step and the digest
//! so far, and seals it with a new checksum. **The index**, elsewhere in RAM, repeats every page's
//! version: a page that came from an older snapshot has a good checksum, but not the version that
//! the index remembers.
//!
//! **The processor's registers** hold what is nowhere in RAM ([`Registers`]): a guest restored
//! without its vCPU state cannot reach the right digest.

/// Bytes of a ledger page: the smallest page that any tracker here knows.
pub const PAGE: u64 = 4096;
/// Bytes of a word, the unit of every access.
pub const WORD: u64 = 8;
/// Entries of a page: all words but number, version and checksum.
pub const ENTRIES: u64 = PAGE / WORD - 3;

/// Offsets of a page's words, in bytes.
pub const NUMBER: u64 = 0;
pub const VERSION: u64 = 8;
pub const ENTRY: u64 = 16;
pub const CHECKSUM: u64 = PAGE - WORD;

/// Pages that are written again and again: 20 steps of 32.
pub const HOT: u64 = 64;
/// Of this many steps of the roaming kind, one jumps elsewhere.
pub const JUMP: u64 = 128;
/// The odd multiplier of `mix`: 2^64 divided by the golden ratio (Knuth, The Art of Computer
/// Programming 3, 6.4).
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Where the random numbers begin; any number but 0.
pub const SEED: u64 = 0x0123_4567_89ab_cdef;
/// "Which page was at fault" where no page was.
pub const NO_PAGE: u64 = u64::MAX;

/// Where the front page, the ledger and its index lie, as byte offsets into the RAM.
///
/// The first 2 MiB are the machine's: page tables and the guest's program where the guest is a
/// virtual machine, and the front page with everything that guest and host say to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM.
    pub ram: u64,
    /// Pages of the ledger.
    pub pages: u64,
}

impl Layout {
    /// The front page: the last of the first 2 MiB.
    pub const FRONT: u64 = Self::LEDGER - PAGE;
    /// The first page of the ledger.
    pub const LEDGER: u64 = 2 << 20;
    /// The least RAM: it leaves room for the hot pages, and some more.
    pub const MIN_RAM: u64 = 4 << 20;

    /// The most RAM whose page tables fit below the guest's program.
    pub const MAX_RAM: u64 = 256 << 30;

    /// Divides `ram` bytes, a multiple of [`PAGE`] and at least [`Self::MIN_RAM`].
    pub const fn of(ram: u64) -> Self {
        let pages = (ram - Self::LEDGER) / PAGE;
        // An index page serves as many ledger pages as it has words.
        let index = pages.div_ceil(PAGE / WORD + 1);
        Self {
            ram,
            pages: pages - index,
        }
    }

    /// The offset of ledger page `number`.
    pub fn page(self, number: u64) -> u64 {
        Self::LEDGER + number * PAGE
    }

    /// The offset of the index.
    pub fn index(self) -> u64 {
        self.page(self.pages)
    }
}

/// The words of the front page, as byte offsets into the RAM.
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    allow(
        dead_code,
        reason = "an embedded guest takes its orders as function calls"
    )
)]
pub mod front {
    use super::Layout;

    const fn word(number: u64) -> u64 {
        Layout::FRONT + number * super::WORD
    }

    /// From the host: the step to work until.
    pub const UNTIL: u64 = word(0);
    /// From the host: 0 to work, 1 to check.
    pub const ORDER: u64 = word(1);
    /// From the host, once: the end of the low RAM and the size of the hole above it (the last
    /// address and 0: no hole).
    pub const GAP_START: u64 = word(2);
    pub const GAP_SIZE: u64 = word(3);
    /// From the host, once: pages of the ledger.
    pub const PAGES: u64 = word(4);

    /// The guest's: the state of its random numbers.
    pub const RANDOM: u64 = word(8);
    /// The guest's: the page written last by the sequential steps.
    pub const CURSOR: u64 = word(9);
    /// The guest's: the page written last by the roaming steps.
    pub const ROAMER: u64 = word(10);
    /// The guest's: steps done. In a register too; a check compares them.
    pub const STEPS: u64 = word(11);

    /// To the host: how many pages were found stale or torn, and the first of them.
    pub const FAULTS: u64 = word(16);
    pub const FIRST_FAULT: u64 = word(17);
    /// To the host, after a check: the digest over registers, pages and index.
    pub const DIGEST: u64 = word(18);
}

/// Memory as the ledger uses it: words at byte offsets into the RAM.
pub trait Words {
    /// The word at `offset`.
    fn load(&self, offset: u64) -> u64;
    /// Replaces the word at `offset`.
    fn store(&mut self, offset: u64, word: u64);
}

/// What the guest keeps in processor registers only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Registers {
    /// Steps done.
    pub step: u64,
    /// The running digest.
    pub digest: u64,
    /// The sum of all entries: in a vector register, so that the FPU's state counts too.
    pub sum: u64,
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Pages found stale or torn, while working or checking.
    pub faults: u64,
    /// The first of them.
    pub first_fault: u64,
    /// The digest over registers, pages and index.
    pub digest: u64,
}

/// What the host writes before the guest's first instruction.
pub fn prepare(memory: &mut impl Words, layout: Layout) {
    memory.store(front::PAGES, layout.pages);
    memory.store(front::GAP_START, u64::MAX);
    memory.store(front::RANDOM, SEED);
    memory.store(front::FIRST_FAULT, NO_PAGE);
}

/// Works on the ledger for one step.
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

/// Walks the whole ledger, and the registers first.
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

/// What the front page says after a check.
pub fn verdict(memory: &impl Words) -> Verdict {
    Verdict {
        faults: memory.load(front::FAULTS),
        first_fault: memory.load(front::FIRST_FAULT),
        digest: memory.load(front::DIGEST),
    }
}

/// The page of the next step: hot pages, a sequence, runs that begin anywhere, and now and then any
/// page at all.
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

/// The page after the one that `place` remembers; the first after the last.
fn advance(memory: &mut impl Words, place: u64, layout: Layout) -> u64 {
    let next = memory.load(place) + 1;
    let next = if next == layout.pages { 0 } else { next };
    memory.store(place, next);
    next
}

/// The next random number after `x` (Marsaglia, "Xorshift RNGs", Journal of Statistical Software 8
/// (2003) 14).
fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// The random number `x` as one below `n`.
fn scale(x: u64, n: u64) -> u64 {
    ((u128::from(x) * u128::from(n)) >> 64) as u64
}

/// Adds a word to a digest. For a given word it is one-to-one, so one changed word always changes
/// the result.
fn mix(digest: u64, word: u64) -> u64 {
    (digest.rotate_left(5) ^ word).wrapping_mul(GOLDEN)
}

/// The checksum that the page at `page` ought to have.
fn checksum(memory: &impl Words, page: u64) -> u64 {
    (page..page + CHECKSUM)
        .step_by(WORD as usize)
        .fold(0, |sum, at| mix(sum, memory.load(at)))
}

/// Whether a page is what was last written to it: not torn, not stale, not another one.
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
