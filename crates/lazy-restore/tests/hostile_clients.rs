//! Clients of a page server that send what no VMM sends.
#![cfg(target_os = "linux")]

mod support;

use std::time::Duration;

use lazy_restore::{OnFailure, PageServer, Reaction, ServeError, VmEnd};
use nix::sys::signal::Signal;
use page_client::{Client, Memory, Message, Sent};
use rstest::rstest;
use support::served::{Listening, MIB, PAGE, on_demand};
use test_images::Images;
use test_machine::needs;

/// Not a test: the process of the client.
#[test]
fn page_client() {
    page_client::run();
}

fn images() -> Images {
    Images::new(4 * MIB, PAGE).with([0..1024])
}

/// Lets a client with `memory` send `message`, and returns the error of the server.
fn refused(
    listening: &Listening,
    memory: &Memory,
    message: impl FnOnce(&Client) -> Message,
) -> (Client, ServeError) {
    let mut client = Client::spawn("page_client");
    client.map(memory);
    client.open(&listening.socket);
    let message = message(&client);
    client.send(&message);
    (client, listening.serve().unwrap_err().error)
}

fn with_descriptor(bytes: &[u8]) -> Message {
    Message {
        parts: vec![bytes.to_vec()],
        descriptors: vec![(0, Sent::Userfaultfd)],
    }
}

#[rstest]
#[case::no_json(b"GET / HTTP/1.1\r\n".to_vec(), "JSON")]
#[case::other_json(br#"{"regions": []}"#.to_vec(), "JSON")]
#[case::no_regions(b"[]".to_vec(), "no memory region")]
#[case::wrong_size(br#"[{"base_host_virt_addr":65536,"size":65536,"offset":0}]"#.to_vec(), "the image")]
#[case::not_mapped(br#"[{"base_host_virt_addr":65536,"size":4194304,"offset":0}]"#.to_vec(), "cannot be filled")]
fn malformed_message_with_a_descriptor_ends_the_client(
    #[case] message: Vec<u8>,
    #[case] says: &str,
) {
    needs!(Userfaultfd);
    let listening = Listening::new(&images(), &on_demand());
    let memory = Memory::private([4 * MIB]);
    let (mut client, error) = refused(&listening, &memory, |_| with_descriptor(&message));
    assert!(error.to_string().contains(says), "{error}");
    // It would wait forever for its pages.
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
    let metrics = listening.server.metrics();
    assert_eq!((metrics.refused_clients, metrics.failed_vms), (1, 0));
}

#[test]
fn refused_client_is_notified_by_option() {
    needs!(Userfaultfd);
    let options = on_demand().on_failure(OnFailure::Notify);
    let listening = Listening::new(&images(), &options);
    let mut client = Client::spawn("page_client");
    client.map(&Memory::private([4 * MIB]));
    client.open(&listening.socket);
    client.send(&with_descriptor(b"[]"));
    std::thread::scope(|scope| {
        // The server keeps the descriptor until the client has exited.
        let serving = scope.spawn(|| {
            let refused = listening.serve().unwrap_err();
            assert_eq!(refused.reaction, Some(Reaction::Notified));
            refused.error
        });
        let notice = client.read_notice();
        assert!(notice.contains("no memory region"), "{notice}");
        assert!(client.runs());
        client.signal(Signal::SIGKILL);
        let error = serving.join().unwrap();
        assert!(matches!(error, ServeError::Message(_)), "{error}");
    });
}

#[test]
fn client_without_a_descriptor_is_left_alone() {
    needs!(Userfaultfd);
    let limit = Duration::from_millis(1);
    let listening = Listening::new(&images(), &on_demand().handshake_limit(limit));
    let memory = Memory::private([4 * MIB]);
    let messages: [fn(&Client) -> Message; 2] = [
        |_| Message::default(),
        |client| Message {
            descriptors: Vec::new(),
            ..client.message()
        },
    ];
    for message in messages {
        let (mut client, error) = refused(&listening, &memory, message);
        assert!(matches!(error, ServeError::Timeout), "{error}");
        assert!(client.runs());
    }
}

#[rstest]
#[case::another_file(vec![(0, Sent::Null)], "not a userfaultfd")]
#[case::two(vec![(0, Sent::Userfaultfd), (0, Sent::Null)], "several")]
fn descriptors_other_than_one_userfaultfd_are_refused(
    #[case] descriptors: Vec<(usize, Sent)>,
    #[case] says: &str,
) {
    needs!(Userfaultfd);
    let listening = Listening::new(&images(), &on_demand());
    let memory = Memory::private([4 * MIB]);
    let (_client, error) = refused(&listening, &memory, |client| Message {
        descriptors,
        ..client.message()
    });
    assert!(error.to_string().contains(says), "{error}");
}

/// The memory is that of hugetlbfs if, and only if, its pages are larger than the host's.
#[test]
fn page_size_that_the_memory_does_not_have_is_refused() {
    needs!(Userfaultfd);
    let listening = Listening::new(&images(), &on_demand());
    let memory = Memory::private([4 * MIB]);
    let (_client, error) = refused(&listening, &memory, |client| {
        let listed = client.listed().replace("4096", "65536");
        // Aligned by chance or not: both are refused.
        with_descriptor(listed.as_bytes())
    });
    let refused = matches!(error, ServeError::Region { .. } | ServeError::Message(_));
    assert!(refused, "{error}");
}

/// It touches memory that it has registered and not listed.
#[test]
fn fault_outside_of_the_listed_regions_ends_the_client() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let mut client = Client::spawn("page_client");
    client.map(&Memory::private([4 * MIB, MIB]));
    let listed: serde_json::Value = serde_json::from_str(&client.listed()).unwrap();
    let first = serde_json::json!([listed[0]]).to_string();
    client.open(&listening.socket);
    client.send(&with_descriptor(first.as_bytes()));
    let vm = listening.serve().unwrap();
    assert!(client.read(0, MIB).unwrap() == images.ram[..1 << 20]);
    client.begin_read(4 * MIB + 5, 1);
    let end = vm.wait();
    let VmEnd::Failed(why) = end else {
        panic!("{end:?}");
    };
    assert!(why.to_string().contains("none of the regions"), "{why}");
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
}

/// A page that the client has written before it is registered is not the guest's.
#[test]
fn page_that_is_already_there_ends_the_client() {
    needs!(Userfaultfd);
    let listening = Listening::new(&images(), &PageServer::options());
    let mut client = Client::spawn("page_client");
    let memory = Memory {
        registered: false,
        ..Memory::private([4 * MIB])
    };
    client.map(&memory);
    client.write(MIB, 7);
    client.connect(&listening.socket);
    let vm = listening.serve().unwrap();
    let end = vm.wait();
    assert!(matches!(end, VmEnd::Failed(_)), "{end:?}");
    assert_eq!(client.ended_by(), Some(Signal::SIGKILL as i32));
}

#[test]
fn stopped_client_does_not_delay_others() {
    needs!(Userfaultfd);
    let images = images();
    let listening = Listening::new(&images, &on_demand());
    let memory = Memory::private([4 * MIB]);
    let (stopped, vm) = listening.serve_client(&memory);
    stopped.signal(Signal::SIGSTOP);
    let (mut other, _other_vm) = listening.serve_client(&memory);
    assert!(other.read(0, 4 * MIB).unwrap() == images.ram);
    drop(stopped);
    assert!(matches!(vm.wait(), VmEnd::Exited));
}
