//! Epochs of logged RAM: each take of marks follows a harvest.
#![cfg(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom)))]

mod support;

use std::collections::BTreeSet;

use dirty_bitmap::BeginEpochError;
use kvm_backend::{DirtyLog, LogEpochError, PausedHarvest, Reprotect};
use rstest::rstest;
use support::Guest;
use support::dirty_pages::{TOUCHED, pages, pages_of};
use test_machine::needs;

fn harvest(guest: &mut Guest, log: &DirtyLog) -> PausedHarvest {
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    log.harvest(guest.vcpus.pause().unwrap()).unwrap()
}

/// Returns the touched pages among the marked ones: the list of the addresses is marked too.
fn touched<K>(bitmap: &dirty_bitmap::DirtyBitmap<K>) -> BTreeSet<u64> {
    &pages(bitmap) & &pages_of(&TOUCHED)
}

#[rstest]
fn epoch_of_a_pause_has_the_pages_in_the_log(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    guest.touch(&TOUCHED);
    assert!(
        touched(guest.ram.dirty_bitmap()).is_empty(),
        "only in the log"
    );
    let harvest = harvest(&mut guest, &log);
    let epoch = harvest.begin_epoch().unwrap();
    assert_eq!(touched(epoch.bitmap()), pages_of(&TOUCHED));
    assert_eq!(
        harvest.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
}

#[rstest]
fn kept_epoch_is_extended_by_later_harvests(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    guest.touch(&TOUCHED[..2]);
    let paused = harvest(&mut guest, &log);
    let mut epoch = paused.begin_epoch().unwrap();
    drop(paused); // the epoch is kept while the vCPUs run
    guest.touch(&TOUCHED[2..4]);
    let live = log.extend_live(&mut epoch).unwrap();
    assert_eq!(touched(&live), pages_of(&TOUCHED[2..4]));
    guest.touch(&TOUCHED[4..]);
    let paused = harvest(&mut guest, &log);
    let last = paused.extend(&mut epoch).unwrap();
    assert_eq!(touched(&last), pages_of(&TOUCHED[4..]));
    assert_eq!(touched(epoch.bitmap()), pages_of(&TOUCHED));
}

#[test]
fn live_epoch_has_the_writes_before_it() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenMarked);
    guest.touch(&TOUCHED);
    let epoch = log.begin_live_epoch().unwrap();
    assert_eq!(touched(epoch.bitmap()), pages_of(&TOUCHED));
    let error = log.begin_live_epoch().unwrap_err();
    assert!(matches!(error, LogEpochError::Begin(_)), "{error}");
}

#[test]
fn epoch_of_a_second_log_has_the_writes_since_the_first() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    drop(guest.log(Reprotect::WhenMarked));
    guest.touch(&TOUCHED); // KVM's log is on
    let log = DirtyLog::start(&guest.slots).unwrap();
    let harvest = harvest(&mut guest, &log);
    let epoch = harvest.begin_epoch().unwrap();
    assert_eq!(touched(epoch.bitmap()), pages_of(&TOUCHED));
}

#[test]
fn epoch_of_other_ram_is_not_extended() {
    needs!(Kvm);
    let (mut guest, other) = (Guest::touching(), Guest::touching());
    let log = guest.log(Reprotect::WhenMarked);
    let mut epoch = other.log(Reprotect::WhenMarked).begin_live_epoch().unwrap();
    guest.touch(&TOUCHED);
    let error = log.extend_live(&mut epoch).unwrap_err();
    assert!(matches!(error, LogEpochError::OtherRam), "{error}");
    let error = harvest(&mut guest, &log).extend(&mut epoch).unwrap_err();
    assert!(matches!(error, LogEpochError::OtherRam), "{error}");
    assert_eq!(touched(guest.ram.dirty_bitmap()), pages_of(&TOUCHED));
}
