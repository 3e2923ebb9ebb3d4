//! What is done while something goes wrong: what `cargo xtask crash` loses the power in, and what
//! reads more than it writes.

use std::path::Path;
use std::sync::Arc;

use anyhow::ensure;
use dirty_bitmap::DirtyBitmap;
use memory_image::Chain;
use memory_writer::{Engine, MemoryWriter, MemoryWriterOptions};
use nix::errno::Errno;
use scenarios::check::{Next, PostCrashState};
use scenarios::child::PAGE;
use scenarios::commits::{self, DEST, RAM, full};
use scenarios::images;
use scenarios::live;
use scenarios::ram::Stamped;
use scenarios::{CommitObserver, Scenario};

use super::calls::Kind;
use super::case::{Case, case};
use super::child::{Child, WITHIN};
use super::injected_fault::{At, How, InjectedFault};
use super::mutants;
use super::serve::{SERVE, SERVE_NOTIFY, SERVE_THREADS};
use super::tracer::{self, End};

pub(super) static ALL: &[Case] = &[
    case(commits::REPLACE),
    case(commits::FIRST),
    case(commits::NO_CLOBBER),
    Case {
        lacks: Some(("renameat2", Errno::EINVAL)),
        ..case(Scenario {
            name: "no-clobber-link",
            about: "the same where no rename keeps from replacing: by hard links",
            ..commits::NO_CLOBBER
        })
    },
    case(commits::GROUP),
    case(RECOVER),
    case(commits::FULL),
    case(Scenario {
        name: "by-calls",
        about: "a full dump by single pwrite calls on one thread",
        act: |dir, observer| save(dir, observer, engine(Engine::Pwrite)),
        ..ENGINE
    }),
    case(Scenario {
        name: "by-threads",
        about: "a full dump by threads, past the page cache",
        act: |dir, observer| save(dir, observer, engine(Engine::Threads)),
        ..ENGINE
    }),
    case(Scenario {
        name: "by-io-uring",
        about: "a full dump by io_uring, past the page cache",
        act: |dir, observer| save(dir, observer, engine(Engine::IoUring)),
        ..ENGINE
    }),
    case(PRECOPY),
    case(RECYCLE),
    case(STALE_STAGE),
    Case {
        threads: true,
        ..case(commits::TWO_WRITERS)
    },
    case(images::DIFF),
    case(images::SEALED),
    case(images::PACKED),
    case(images::MERGE),
    case(RESTORE),
    case(live::LIVE),
    case(live::LIVE_PRECOPY),
    case(live::LIVE_DIFF),
    SERVE,
    SERVE_NOTIFY,
    SERVE_THREADS,
];

/// A mutant is one too.
pub(super) fn named(name: &str) -> Option<&'static Case> {
    let mutants = mutants::ALL.iter().chain([&mutants::CONTROL]);
    ALL.iter()
        .chain(mutants)
        .find(|case| case.scenario.name == name)
}

const ENGINE: Scenario = Scenario {
    name: "",
    about: "",
    prepare: |dir| full(dir, 1),
    act: |_, _| Ok(()),
    check: |after| commits::replaced(after, 1, 2),
};

/// Each request is a sixteenth of the RAM.
fn engine(engine: Engine) -> MemoryWriterOptions {
    let options = MemoryWriter::options().engine(engine);
    options.chunk_size(RAM as usize / 16)
}

/// A full dump, which takes all marks.
fn save(
    dir: &Path,
    observer: &dyn CommitObserver,
    options: MemoryWriterOptions,
) -> anyhow::Result<()> {
    let live = all_marked()?;
    observer.saving(&live);
    let epoch = live.begin_epoch()?;
    let mut writer = options.open(dir.join(DEST), RAM, PAGE)?;
    writer.write_full(&Stamped::new(2, RAM))?;
    writer.commit()?;
    epoch.release()?;
    observer.returned()
}

fn all_marked() -> anyhow::Result<Arc<DirtyBitmap>> {
    let live = DirtyBitmap::new(0, RAM, PAGE)?;
    live.mark_range(0, RAM)?;
    Ok(Arc::new(live))
}

const PRECOPY: Scenario = Scenario {
    name: "pre-copy",
    about: "a dump while the guest changes all that it has, and then the changes",
    act: |dir, observer| {
        let live = all_marked()?;
        observer.saving(&live);
        let mut epoch = live.begin_epoch()?;
        let mut writer = MemoryWriter::open(dir.join(DEST), RAM, PAGE)?;
        writer.write_full(&Stamped::new(9, RAM))?;
        live.mark_range(0, RAM)?;
        let dirtied = epoch.extend()?;
        writer.write_diff(&Stamped::new(2, RAM), &dirtied)?;
        writer.commit()?;
        epoch.release()?;
        observer.returned()
    },
    ..ENGINE
};

/// With a fault it may be that a new file is taken after all.
const RECYCLE: Scenario = Scenario {
    act: |dir, observer| {
        for stamp in 3..=4 {
            commits::recycling(dir, stamp)?;
            observer.returned()?;
        }
        Ok(())
    },
    check: |after| commits::replaced(after, 2, 4),
    ..commits::RECYCLE
};

const STALE_STAGE: Scenario = Scenario {
    prepare: |dir| {
        full(dir, 1)?;
        commits::die_writing(dir)
    },
    act: |dir, observer| {
        full(dir, 2)?;
        observer.returned()
    },
    ..commits::STALE_STAGE
};

const RECOVER: Scenario = Scenario {
    name: "recover",
    about: "a group commit of which one of two files was renamed is completed",
    prepare: |dir| {
        (commits::GROUP.prepare)(dir)?;
        let second = Kind::named("renameat").map(|kind| At {
            kind,
            // The first shows the record's ticket, the second publishes the record.
            nth: 4,
            how: How::Kill,
        });
        let report = dir.join("report");
        let command = Child::new(commits::GROUP.name, dir, &report, None).command()?;
        let fault = second.map(InjectedFault::Call);
        let trace = tracer::trace(command, fault.as_ref(), None, WITHIN)?;
        ensure!(
            trace.met && matches!(trace.end, End::Killed(_)),
            "{trace:?}"
        );
        Ok(())
    },
    act: |dir, observer| {
        atomic_file::recover(dir)?;
        observer.returned()
    },
    // Regardless of the result: the next recovery continues where this one stopped.
    check: |after| {
        (commits::GROUP.check)(&PostCrashState {
            returned: 1,
            next: Next::Not,
            ..*after
        })
    },
};

const RESTORE: Scenario = Scenario {
    name: "restore",
    about: "a packed chain is read into a new guest's RAM",
    act: |dir, _| {
        let chain = Chain::open_sealed(&images::chain_in(dir))?;
        let mut ram = vec![0; RAM as usize];
        chain.restore(ram.as_mut_slice())?;
        ensure!(ram == images::ram_after_diff(2), "it restored other bytes");
        Ok(())
    },
    ..images::PACKED
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shared_scenario_is_a_case() {
        for scenario in scenarios::ALL {
            let same = |case: &&Case| case.scenario.name == scenario.name;
            assert_eq!(ALL.iter().filter(same).count(), 1, "{}", scenario.name);
        }
    }
}
