//! A page server that fills the RAM of another process.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use lazy_restore::{
    OnDamage, OnFailure, PageServer, PageServerOptions, RamSource, VmEnd, WorkingSet,
};
use memory_image::{Chain, Image, VerifiedChain};
use memory_writer::{Layout, MemoryWriter};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use page_client::{Client, Memory, Message, Sent};
use page_reader::PageReader;
use rstest::rstest;
use support::served::{Listening, MIB, PAGE, on_demand};
use test_images::Images;
use test_machine::needs;

/// Not a test: the process of the client.
#[test]
fn page_client() {
    page_client::run();
}

const SIZE: u64 = 16 * MIB;

fn images() -> Images {
    Images::new(SIZE, PAGE)
        .with([0..1500, 2000..4096])
        .with((13..200).map(|i| 20 * i..20 * i + 1))
        .with([900..1100, 3500..3600])
}

/// The RAM in three regions.
fn memory() -> Memory {
    Memory::private([3 * MIB, 8 * MIB + 12 * PAGE, 5 * MIB - 12 * PAGE])
}

#[rstest]
#[case::on_demand(on_demand())]
#[case::in_the_background(PageServer::options())]
#[case::one_handler(on_demand().handlers(1).fault_around(0))]
fn client_reads_the_bytes_of_the_chain(#[case] options: PageServerOptions) {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &options);
    let (mut client, vm) = listening.serve_client(&memory());
    assert_eq!(vm.process().id.cast_unsigned(), client.id());
    // Across two regions, and what the kernel reads.
    let at = 3 * MIB - 100;
    let bytes = client.read(at, 5000).unwrap();
    assert!(bytes == images.ram[at as usize..][..5000]);
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    vm.complete();
    assert!(matches!(vm.wait(), VmEnd::Filled), "{:?}", vm.wait());
    drop(vm);
    // It no longer needs the server.
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    let metrics = listening.server.metrics();
    assert_eq!(
        (metrics.vms, metrics.filled_vms, metrics.failed_vms),
        (0, 1, 0)
    );
}

#[test]
fn completed_ram_needs_no_descriptor() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let (mut client, vm) = listening.serve_client(&memory());
    client.close_descriptor();
    client.read(5 * MIB, 10).unwrap();
    vm.complete();
    assert!(matches!(vm.wait(), VmEnd::Filled));
    drop(vm);
    assert!(client.read(0, SIZE).unwrap() == images.ram);
}

#[test]
fn faults_of_many_threads_are_in_flight_at_once() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand().handlers(4));
    let (mut client, vm) = listening.serve_client(&memory());
    let expected: u64 = images
        .ram
        .iter()
        .step_by(PAGE as usize)
        .map(|byte| u64::from(*byte))
        .sum();
    assert_eq!(client.touch(8, PAGE), expected);
    assert_eq!(listening.server.metrics().vms, 1);
    client.signal(Signal::SIGKILL);
    assert!(matches!(vm.wait(), VmEnd::Exited));
    assert!(vm.faults() > 0);
    let metrics = listening.server.metrics();
    assert_eq!(metrics.vms, 0);
    // The last one may have ended with the process.
    assert!((1..=vm.faults()).contains(&metrics.faults));
    let (_, within) = metrics.fault_times.last().unwrap();
    assert!(*within <= metrics.faults);
    assert!(metrics.bytes_by_faults > 0);
    assert_eq!(
        (metrics.bytes_by_prefetch, metrics.bytes_by_working_set),
        (0, 0)
    );
}

/// Two pages, each of which can only be read while the other one is being read.
#[derive(Default)]
struct TwoAtOnce {
    reading: Mutex<u32>,
    changed: Condvar,
}

impl PageReader for TwoAtOnce {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill((offset / PAGE + 1) as u8);
        let mut reading = self.reading.lock().unwrap();
        *reading += 1;
        self.changed.notify_all();
        // Without the other read, this one fails, also when it is repeated.
        let limit = Duration::from_secs(60);
        let waiting = |reading: &mut u32| *reading < 2;
        let waited = self.changed.wait_timeout_while(reading, limit, waiting);
        let (mut reading, waited) = waited.unwrap();
        if waited.timed_out() {
            *reading -= 1;
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl RamSource for TwoAtOnce {
    fn ram_size(&self) -> u64 {
        2 * PAGE
    }
}

#[test]
fn second_fault_does_not_wait_for_the_first() {
    needs!(Userfaultfd);
    let options = on_demand().handlers(2).fault_around(0);
    let server = options.source(TwoAtOnce::default()).unwrap();
    let listening = Listening::with(server);
    let (mut client, _vm) = listening.serve_client(&Memory::private([2 * PAGE]));
    assert_eq!(client.touch(2, PAGE), 1 + 2);
}

#[test]
fn several_vms_are_served_from_one_chain() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let mut vms: Vec<_> = (0..3).map(|_| listening.serve_client(&memory())).collect();
    assert_eq!(listening.server.metrics().vms, 3);
    for (client, _) in &mut vms {
        client.write(7 * MIB, 0xaa);
        assert_eq!(client.read(7 * MIB, 1), Ok(vec![0xaa]));
    }
    let (mut last, vm) = vms.pop().unwrap();
    drop(vms);
    assert!(last.read(8 * MIB, MIB).unwrap() == images.ram[8 << 20..9 << 20]);
    drop(vm);
}

#[test]
fn removed_pages_are_zeros_and_others_are_not() {
    needs!(Userfaultfd);
    let mut images = images();
    let listening = Listening::new(&images, &on_demand());
    let (mut client, vm) = listening.serve_client(&memory());
    client.read(2500 * PAGE, 10 * PAGE).unwrap();
    // Filled pages, missing pages, and both, in one region and at its end.
    for (first, pages) in [(2505, 3), (100, 50), (2508, 40), (766, 2)] {
        client.remove(first * PAGE, pages * PAGE);
        images.ram[(first * PAGE) as usize..][..(pages * PAGE) as usize].fill(0);
    }
    // A removed page is zeros also if it is written.
    client.write(101 * PAGE + 5, 9);
    images.ram[101 * PAGE as usize + 5] = 9;
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    client.remove(3000 * PAGE, PAGE);
    images.ram[3000 * PAGE as usize..][..PAGE as usize].fill(0);
    vm.complete();
    assert!(matches!(vm.wait(), VmEnd::Filled));
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    assert_eq!(listening.server.metrics().removed_bytes, 96 * PAGE);
}

#[test]
fn removes_in_the_background_do_not_stop_filling() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &PageServer::options());
    let (mut client, vm) = listening.serve_client(&memory());
    for page in (0..SIZE / PAGE).step_by(64) {
        client.remove(page * PAGE, PAGE);
    }
    assert!(matches!(vm.wait(), VmEnd::Filled));
    let bytes = client.read(0, SIZE).unwrap();
    for (number, page) in bytes.chunks(PAGE as usize).enumerate() {
        let expected = &images.ram[number * PAGE as usize..][..PAGE as usize];
        let zero = number % 64 == 0 && page.iter().all(|byte| *byte == 0);
        assert!(zero || page == expected, "page {number}");
    }
}

#[test]
fn huge_pages_are_filled_as_a_whole() {
    const TEST: &str = "huge_pages_are_filled_as_a_whole";
    needs!(Userfaultfd, HugePages);
    // Overcommitted huge pages are allocated when they are touched.
    let setting = "/proc/sys/vm/nr_overcommit_hugepages";
    let before = fs::read_to_string(setting).unwrap();
    if before.trim().parse::<u64>().unwrap() < 16 && fs::write(setting, "16").is_err() {
        return test_machine::not_run(TEST, "huge pages cannot be provided");
    }
    let mut images = images();
    let listening = Listening::new(&images, &on_demand());
    let mut memory = Memory::private([4 * MIB, 12 * MIB]);
    memory.huge = true;
    let (mut client, vm) = listening.serve_client(&memory);
    assert!(client.read(5 * MIB, 10).unwrap() == images.ram[5 << 20..][..10]);
    client.remove(6 * MIB, 4 * MIB);
    images.ram[6 << 20..10 << 20].fill(0);
    assert!(client.read(6 * MIB, MIB).unwrap() == images.ram[6 << 20..7 << 20]);
    vm.complete();
    assert!(matches!(vm.wait(), VmEnd::Filled), "{:?}", vm.wait());
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    drop(client);
    fs::write(setting, before).unwrap();
}

#[test]
fn recorded_pages_are_filled_first() {
    needs!(Userfaultfd);
    let images = images();
    let touched = [3000 * PAGE, 5 * PAGE, 2100 * PAGE];
    let recording = Listening::new(&images, &on_demand().record(true));
    let (mut client, vm) = recording.serve_client(&memory());
    for at in touched {
        client.read(at, 1).unwrap();
    }
    client.signal(Signal::SIGKILL);
    assert!(matches!(vm.wait(), VmEnd::Exited));
    let set = vm.recorded().unwrap();
    let runs: Vec<_> = set.runs().map(|run| run.start).collect();
    assert_eq!(runs, touched);
    let options = PageServer::options().working_set(set);
    let listening = Listening::new(&images, &options);
    let (mut client, vm) = listening.serve_client(&memory());
    assert!(matches!(vm.wait(), VmEnd::Filled));
    assert!(client.read(0, SIZE).unwrap() == images.ram);
    assert_eq!(listening.server.metrics().bytes_by_working_set, 3 * PAGE);
}

#[test]
fn working_set_of_another_guest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("set");
    let images = Images::new(MIB, PAGE).with([0..2]);
    let server = |ram_size: u64| {
        let source = lazy_restore::SizedReader::new(images.ram.clone(), ram_size);
        let options = match WorkingSet::load(&path) {
            Ok(set) => PageServer::options().working_set(set),
            Err(_) => PageServer::options(),
        };
        options.source(source)
    };
    server(0).unwrap_err();
    server(MIB).unwrap();
    // A set without runs: the header of the documented format.
    let body = (2 * MIB).to_le_bytes();
    let mut file = b"RAMSNAPW\x01\0\0\0".to_vec();
    file.extend(crc(&body).to_le_bytes());
    file.extend(body);
    fs::write(&path, file).unwrap();
    assert!(server(MIB).unwrap_err().to_string().contains("working set"));
}

/// CRC-32 (IEEE).
fn crc(bytes: &[u8]) -> u32 {
    let fold = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, fold)
}

#[test]
fn client_that_dies_ends_only_its_own_serving() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let (mut other, _vm) = listening.serve_client(&memory());
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let (mut client, vm) = listening.serve_client(&memory());
        client.read(MIB, 1).unwrap();
        client.signal(signal);
        assert!(matches!(vm.wait(), VmEnd::Exited));
        assert_eq!(client.ended_by(), Some(signal as i32));
    }
    assert_eq!(listening.server.metrics().exited_vms, 2);
    assert!(other.read(0, SIZE).unwrap() == images.ram);
}

#[test]
fn connection_that_is_shut_down_does_not_end_serving() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let (mut client, _vm) = listening.serve_client(&memory());
    client.disconnect();
    assert!(client.read(0, SIZE).unwrap() == images.ram);
}

/// Writes a packed image of the RAM, of which a byte in the second MiB is then changed.
fn damaged(ram: &Vec<u8>) -> (tempfile::TempDir, VerifiedChain) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    let options = MemoryWriter::options().layout(Layout::Packed);
    let mut writer = options.open(&path, ram.len() as u64, PAGE).unwrap();
    writer.write_full(ram).unwrap();
    writer.commit().unwrap();
    let footer = Image::open(&path).unwrap().footer().cloned().unwrap();
    let at = footer.run_at(MIB + 5).unwrap().stored_at(MIB + 5).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[!ram[MIB as usize + 5]], at).unwrap();
    let chain = VerifiedChain::new(Chain::open_sealed(&[&path]).unwrap());
    (dir, chain)
}

#[rstest]
#[case::touched(on_demand())]
#[case::prefetched(PageServer::options())]
fn damaged_chunk_is_poisoned_and_the_others_are_filled(#[case] options: PageServerOptions) {
    needs!(Userfaultfd);
    let ram = test_memory::pattern(4 * MIB as usize);
    let (_dir, chain) = damaged(&ram);
    let listening = Listening::with(options.source(chain).unwrap());
    let (mut client, vm) = listening.serve_client(&Memory::private([4 * MIB]));
    let check = |client: &mut Client| {
        for at in [MIB, MIB + 5, 2 * MIB - PAGE] {
            assert_eq!(client.read(at, 1), Err(Errno::EFAULT));
        }
        assert!(client.read(0, MIB).unwrap() == ram[..1 << 20]);
        assert!(client.read(2 * MIB, 2 * MIB).unwrap() == ram[2 << 20..]);
    };
    check(&mut client);
    vm.complete();
    assert!(matches!(vm.wait(), VmEnd::Filled), "{:?}", vm.wait());
    assert!(vm.error().unwrap().to_string().contains("damaged"));
    drop(vm);
    check(&mut client);
    let poisoned = listening.server.metrics().poisoned_bytes;
    assert_eq!(poisoned, MIB);
}

#[rstest]
#[case::touched(on_demand())]
#[case::prefetched(PageServer::options())]
fn damaged_chunk_ends_the_vm_by_option(#[case] options: PageServerOptions) {
    needs!(Userfaultfd);
    let ram = test_memory::pattern(4 * MIB as usize);
    let (_dir, chain) = damaged(&ram);
    let options = options.on_damage(OnDamage::Fail);
    let listening = Listening::with(options.source(chain).unwrap());
    let (mut client, vm) = listening.serve_client(&Memory::private([4 * MIB]));
    client.begin_read(MIB, 1);
    let end = vm.wait();
    let VmEnd::Failed(why) = end else {
        panic!("{end:?}");
    };
    assert!(why.to_string().contains("damaged"), "{why}");
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
}

#[test]
fn notified_vm_learns_why_and_finds_no_zeros() {
    needs!(Userfaultfd);
    let ram = test_memory::pattern(4 * MIB as usize);
    let (_dir, chain) = damaged(&ram);
    let options = on_demand()
        .on_damage(OnDamage::Fail)
        .on_failure(OnFailure::Notify);
    let listening = Listening::with(options.source(chain).unwrap());
    let (mut client, vm) = listening.serve_client(&Memory::private([4 * MIB]));
    client.close_descriptor();
    client.read(3 * MIB, PAGE).unwrap();
    client.remove(3 * MIB, PAGE);
    assert_eq!(client.read(MIB, 1), Err(Errno::EFAULT));
    assert!(matches!(vm.wait(), VmEnd::Failed(_)));
    drop(vm);
    let notice = client.read_notice();
    assert!(
        notice.starts_with("{\"error\":") && notice.contains("damaged"),
        "{notice}"
    );
    for at in [0, 2 * MIB, 4 * MIB - PAGE] {
        assert_eq!(client.read(at, 1), Err(Errno::EFAULT), "at {at:#x}");
    }
    // Pages that were filled stay, and discarded ones are zeros.
    assert_eq!(client.read(3 * MIB, 1), Ok(vec![0]));
    assert_eq!(
        client.read(3 * MIB + PAGE, 1),
        Ok(vec![ram[3 * MIB as usize + 4096]])
    );
    assert!(client.runs());
}

/// Its pages may be of two states.
#[test]
fn vm_whose_image_is_written_to_is_ended() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let (mut client, vm) = listening.serve_client(&memory());
    client.read(MIB, 1).unwrap();
    let file = File::options().write(true).open(images.path(0)).unwrap();
    file.write_all_at(&[1], SIZE - 1).unwrap();
    // The time of the change must differ from that of the last write before the chain was opened.
    let later = std::time::SystemTime::now() + Duration::from_secs(5);
    file.set_modified(later).unwrap();
    vm.complete();
    let end = vm.wait();
    assert!(matches!(end, VmEnd::Failed(_)), "{end:?}");
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
}

#[test]
fn vm_that_is_given_up_is_killed() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let (mut client, vm) = listening.serve_client(&memory());
    client.read(MIB, 1).unwrap();
    drop(vm);
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
    assert_eq!(listening.server.metrics().failed_vms, 0);
}

/// Firecracker's message arrives at once. Others may be split, and the descriptor may be late.
#[test]
fn message_may_come_in_parts_and_its_descriptor_late() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let parts = |text: &str, size: usize| -> Vec<_> {
        text.as_bytes().chunks(size).map(<[u8]>::to_vec).collect()
    };
    for with in ["first", "last", "after"] {
        let mut client = Client::spawn("page_client");
        client.map(&memory());
        let mut parts = parts(&client.listed(), 7);
        let number = match with {
            "first" => 0,
            "last" => parts.len() - 1,
            _ => {
                parts.push(b"\n".to_vec());
                parts.len() - 1
            }
        };
        client.open(&listening.socket);
        client.send(&Message {
            parts,
            descriptors: vec![(number, Sent::Userfaultfd)],
        });
        let _vm = listening.serve().unwrap();
        assert!(
            client.read(0, MIB).unwrap() == images.ram[..1 << 20],
            "{with}"
        );
    }
}

#[test]
fn kvm_guest_in_another_process_runs_on_served_ram() {
    needs!(Userfaultfd, Kvm);
    // The processor reads its task state from the lowest bytes, which are zeros.
    let images = Images::new(SIZE, PAGE).with([256..3000]).with([700..4096]);
    for options in [on_demand(), PageServer::options()] {
        let listening = Listening::new(&images, &options);
        let mut memory = Memory::private([SIZE]);
        memory.guest = true;
        let (mut client, vm) = listening.serve_client(&memory);
        let words = images.ram[MIB as usize..].as_chunks::<8>().0;
        let words = words.iter().map(|word| u64::from_le_bytes(*word));
        assert_eq!(client.run_guest(), words.fold(0, u64::wrapping_add));
        assert!(vm.error().is_none());
    }
}
