//! What goes wrong, once, in a run.

use std::fmt;
use std::str::FromStr;

use nix::errno::Errno;

use super::calls::{Kind, errno};
use super::traced_call::Call;

/// How a call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// It does nothing and says so.
    Error(Errno),
    /// It does all, and says that it failed.
    Lost(Errno),
    /// It does no more than so many bytes.
    Short(u64),
    /// The process is killed as it enters the call.
    Kill,
}

/// One call that goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub kind: &'static Kind,
    /// The first of its kind, in any thread, is 1.
    pub nth: u32,
    pub how: How,
}

/// What goes wrong in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InjectedFault {
    Call(At),
    /// As `Call`; and then, of the calls that come after it and can say `EIO`, the one of this
    /// number says it.
    Twice(At, u32),
    /// The file system has room for so many bytes more.
    Room(u64),
    /// No file may be longer: `RLIMIT_FSIZE`.
    Limit(u64),
}

impl PartialEq for At {
    fn eq(&self, other: &Self) -> bool {
        (self.kind.name, self.nth, self.how) == (other.kind.name, other.nth, other.how)
    }
}

impl Eq for At {}

impl InjectedFault {
    /// The call that goes wrong first.
    pub(super) fn at(&self) -> Option<&At> {
        match self {
            Self::Call(at) | Self::Twice(at, _) => Some(at),
            Self::Room(_) | Self::Limit(_) => None,
        }
    }

    pub(super) fn kills(&self) -> bool {
        self.at().is_some_and(|at| at.how == How::Kill)
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, nth, how } = self;
        write!(f, "{}#{nth}:", kind.name)?;
        match how {
            How::Error(errno) => write!(f, "{errno:?}"),
            How::Lost(errno) => write!(f, "lost:{errno:?}"),
            How::Short(bytes) => write!(f, "short:{bytes}"),
            How::Kill => f.write_str("kill"),
        }
    }
}

impl fmt::Display for InjectedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(at) => write!(f, "{at}"),
            Self::Twice(at, after) => write!(f, "{at}+{after}"),
            Self::Room(bytes) => write!(f, "room:{bytes}"),
            Self::Limit(bytes) => write!(f, "limit:{bytes}"),
        }
    }
}

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text}: write CALL#NUMBER:ERROR, :lost:ERROR, :short:BYTES or :kill");
        let known = |name| errno(name).ok_or_else(|| format!("{name}: not an error of any call"));
        let (call, how) = text.split_once(':').ok_or_else(wrong)?;
        let (name, nth) = call.split_once('#').ok_or_else(wrong)?;
        Ok(Self {
            kind: Kind::named(name).ok_or_else(|| format!("{name}: not a call that can fail"))?,
            nth: nth.parse().map_err(|_| wrong())?,
            how: match how.split_once(':') {
                None if how == "kill" => How::Kill,
                None => How::Error(known(how)?),
                Some(("lost", name)) => How::Lost(known(name)?),
                Some(("short", bytes)) => How::Short(bytes.parse().map_err(|_| wrong())?),
                Some(_) => return Err(wrong()),
            },
        })
    }
}

impl FromStr for InjectedFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = |text: &str| text.parse().map_err(|_| format!("{text}: write bytes"));
        match (text.split_once(':'), text.rsplit_once('+')) {
            (Some(("room", room)), _) => Ok(Self::Room(bytes(room)?)),
            (Some(("limit", limit)), _) => Ok(Self::Limit(bytes(limit)?)),
            (_, Some((at, after))) => {
                let after = after
                    .parse()
                    .map_err(|_| format!("{after}: expected a number"))?;
                Ok(Self::Twice(at.parse()?, after))
            }
            _ => text.parse().map(Self::Call),
        }
    }
}

/// Everything that can go wrong, once, with the calls of a run in which nothing did.
pub(super) fn all_of(calls: &[Call]) -> Vec<InjectedFault> {
    calls
        .iter()
        .flat_map(faults_of)
        .map(InjectedFault::Call)
        .collect()
}

fn faults_of(call: &Call) -> Vec<At> {
    let kind = call.kind;
    let lost = kind.lost.iter().filter(|_| call.succeeded());
    let errors = kind.errors.iter().map(|errno| How::Error(*errno));
    let ways = errors
        .chain(lost.map(|errno| How::Lost(*errno)))
        .chain(short_of(call).into_iter().map(How::Short))
        .chain([How::Kill]);
    let at = |how| At {
        kind,
        nth: call.nth,
        how,
    };
    ways.map(at).collect()
}

/// Returns the short counts to inject: 0 (not for reads, where it means the end of the file), one
/// byte, half, whole blocks, and all but one byte.
fn short_of(call: &Call) -> Vec<u64> {
    const BLOCK: u64 = 4096;
    let asked = call.asked;
    if !call.kind.short || !call.succeeded() || asked == 0 {
        return Vec::new();
    }
    let reads = call.kind.name.contains("read");
    let nothing = (!reads).then_some(0);
    let some = [1, asked / 2, (asked / 2).next_multiple_of(BLOCK), asked - 1];
    let mut all: Vec<_> = some
        .into_iter()
        .filter(|len| (1..asked).contains(len))
        .collect();
    all.extend(nothing);
    all.sort_unstable();
    all.dedup();
    all
}

/// A second failure after each of the first that make a writer clear up or look again, at one call
/// after the other: where one does not come, none after it does.
pub(super) fn pairs_of(calls: &[Call]) -> Vec<Vec<InjectedFault>> {
    /// Clearing up takes no more calls than these.
    const AFTER: u32 = 12;
    let first = calls.iter().flat_map(|call| {
        let kind = call.kind;
        let changes = !kind.lost.is_empty() && kind.errors.contains(&Errno::EIO);
        let error = changes.then_some(How::Error(Errno::EIO));
        let lost = (changes && call.succeeded()).then_some(How::Lost(Errno::EIO));
        let at = move |how| At {
            kind,
            nth: call.nth,
            how,
        };
        error.into_iter().chain(lost).map(at)
    });
    let then = |at| {
        (1..=AFTER)
            .map(|after| InjectedFault::Twice(at, after))
            .collect()
    };
    first.map(then).collect()
}

/// Disks that fill up and limits that are reached, at every so many bytes of what is written.
pub(super) fn space(bytes: u64) -> Vec<InjectedFault> {
    const STEP: usize = 60 << 10;
    let ends = (0..bytes + bytes / 4).step_by(STEP);
    // Not at the ends of blocks or of calls alone.
    let odd = [1, 4095, 100_001, bytes - 1, bytes, bytes + 1];
    let rooms = ends.clone().map(InjectedFault::Room);
    rooms
        .chain(ends.chain(odd).map(InjectedFault::Limit))
        .collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("fsync#3:EIO")]
    #[case("renameat#1:lost:ENOENT")]
    #[case("pwrite64#12:short:4096")]
    #[case("close#2:kill")]
    #[case("renameat#1:lost:EIO+2")]
    #[case("room:300000")]
    #[case("limit:1")]
    fn a_fault_is_read_as_it_is_printed(#[case] text: &str) {
        let fault: InjectedFault = text.parse().expect("a fault");
        assert_eq!(fault.to_string(), text);
    }

    #[rstest]
    #[case("fsync")]
    #[case("fsync#x:EIO")]
    #[case("fsync#1:ENOTHING")]
    #[case("reboot#1:EIO")]
    #[case("write#1:long:3")]
    #[case("fsync#1:EIO+x")]
    #[case("room:x")]
    fn what_is_no_fault_is_refused(#[case] text: &str) {
        assert!(text.parse::<InjectedFault>().is_err());
    }

    fn call(name: &str, asked: u64, result: i64) -> Call {
        Call {
            kind: Kind::named(name).expect("a call"),
            nth: 1,
            asked,
            result,
        }
    }

    fn texts(faults: Vec<InjectedFault>) -> Vec<String> {
        faults.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn errors_lost_answers_short_counts_and_kills_are_faults() {
        let all = texts(all_of(&[call("pwrite64", 16384, 16384)]));
        for one in [
            "EIO", "ENOSPC", "EDQUOT", "EINTR", "EAGAIN", "ESTALE", "kill", "lost:EIO",
        ] {
            assert!(all.contains(&format!("pwrite64#1:{one}")), "{one}: {all:?}");
        }
        for len in [0, 1, 8192, 16383] {
            assert!(
                all.contains(&format!("pwrite64#1:short:{len}")),
                "{len}: {all:?}"
            );
        }
    }

    #[test]
    fn a_call_that_failed_by_itself_has_no_answer_to_lose() {
        let all = texts(all_of(&[call("unlinkat", 0, -2)]));
        assert!(all.contains(&"unlinkat#1:EIO".into()), "{all:?}");
        assert!(!all.iter().any(|fault| fault.contains("lost")), "{all:?}");
    }
}
