//! The front end looks into another process: its memory of every kind, its descriptors, its limits and rights, and
//! what becomes of kept handles when it execs, exits, or never answers.
//!
//! The client is this program again, started as a child that does what it is told ([`child`]).

#[path = "child.rs"]
mod child;
#[allow(unsafe_code)]
#[path = "sys.rs"]
mod sys;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use cuse_frontend::client::{Clients, OwnFiles, ProcessCaller, TransportCall};
use cuse_frontend::files::{ClientCall, OpenFile};
use ioas::UserAddr;
use ioas::caller::{Caller, Capability, FdError, FileKind, MemoryError, Uid};

use child::Child;

const PAGE: usize = 4096;

/// No mount, no signals.
struct Nothing;

impl OwnFiles for Nothing {
    fn device(&self) -> Option<u64> {
        None
    }

    fn open_file(&self, _: u64) -> Option<Arc<OpenFile>> {
        None
    }
}

impl TransportCall for Nothing {
    fn own_file(&self, _: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        Ok(None)
    }

    fn uid(&self) -> Uid {
        Uid(0)
    }

    fn killed(&self) -> bool {
        false
    }
}

fn clients() -> Clients {
    Clients::new(Arc::new(Nothing))
}

fn call(clients: &Clients, tid: u32) -> ProcessCaller<'_> {
    clients.caller(tid, &Nothing)
}

#[test]
fn arguments_are_copied_as_the_client_itself_may() {
    let (child, clients) = (Child::start(), clients());
    let caller = call(&clients, child.pid());
    let mut bytes = [0; 8];
    for kind in ["private", "private-read", "shared", "shared-read", "shared-anonymous", "private-file"] {
        caller.read(child.at(kind), &mut bytes).expect(kind);
        assert_eq!(&bytes, b"contents", "{kind}");
    }
    for kind in ["private", "shared", "shared-anonymous", "private-file"] {
        caller.write(child.at(kind), b"replaced").expect(kind);
        caller.read(child.at(kind), &mut bytes).expect(kind);
        assert_eq!(&bytes, b"replaced", "{kind}");
    }
    for kind in ["private-read", "shared-read", "none", "hole"] {
        let address = child.at(kind);
        assert_eq!(caller.write(address, b"replaced"), Err(MemoryError::Fault(address)), "{kind}");
    }
    for kind in ["none", "hole"] {
        let address = child.at(kind);
        assert_eq!(caller.read(address, &mut bytes), Err(MemoryError::Fault(address)), "{kind}");
    }
}

#[test]
fn argument_that_runs_into_a_hole_faults_at_the_hole() {
    let (child, clients) = (Child::start(), clients());
    let caller = call(&clients, child.pid());
    let hole = child.at("hole");
    let before = UserAddr(hole.0 - 4);
    assert_eq!(caller.read(before, &mut [0; 8]), Err(MemoryError::Fault(hole)));
    assert_eq!(caller.write(before, &[0; 8]), Err(MemoryError::Fault(hole)));
}

#[test]
fn mappings_are_reported_with_their_rights_and_files() {
    let (child, clients) = (Child::start(), clients());
    let memory = call(&clients, child.pid()).memory_map().expect("a memory map");
    //           kind               readable writable shared file
    let rows = [
        ("private", true, true, false, false),
        ("private-read", true, false, false, false),
        ("shared", true, true, true, true),
        ("shared-read", true, false, true, true),
        ("shared-anonymous", true, true, true, true),
        ("private-file", true, true, false, true),
        ("none", false, false, false, false),
    ];
    for (kind, readable, writable, shared, file) in rows {
        let vma = memory.vma(child.at(kind)).expect(kind);
        let seen = (vma.readable, vma.writable, vma.shared, vma.file.is_some());
        assert_eq!(seen, (readable, writable, shared, file), "{kind}");
        assert!(vma.range.contains(child.at(kind)), "{kind}");
    }
    assert_eq!(memory.vma(child.at("hole")), Err(MemoryError::Fault(child.at("hole"))));
}

/// Whether a file that nobody has open can be opened by a mapping of it.
fn opens_by_mapping() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn files_behind_shared_mappings_open_with_the_rights_of_the_mapping() {
    let (child, clients) = (Child::start(), clients());
    let memory = call(&clients, child.pid()).memory_map().expect("a memory map");
    for (kind, writable) in [("shared", true), ("shared-read", false), ("shared-anonymous", true)] {
        let vma = memory.vma(child.at(kind)).expect(kind);
        if kind == "shared-anonymous" && !opens_by_mapping() {
            assert_eq!(memory.open_file(&vma).err(), Some(MemoryError::Denied), "it is reached as private memory");
            continue;
        }
        let file = memory.open_file(&vma).expect(kind);
        assert_eq!((file.kind, file.writable), (FileKind::Shmem, writable), "{kind}");
        assert_eq!(Some(file.id), vma.file.map(|(id, _)| id), "{kind}");
        let offset = vma.file.expect("a file").1 + (child.at(kind).0 - vma.range.start().0);
        assert_eq!(&sys::bytes_at(&file.fd, offset), b"contents", "{kind}");
    }
    for kind in ["private", "private-file"] {
        let vma = memory.vma(child.at(kind)).expect(kind);
        assert!(memory.open_file(&vma).is_err(), "{kind}: what it holds is not what the client sees");
    }
}

#[test]
fn mapping_of_secret_memory_cannot_be_opened() {
    let child = Child::start();
    let Some(address) = child.find("secret") else {
        println!("Skipped(this kernel has no memfd_secret)");
        return;
    };
    let clients = clients();
    let memory = call(&clients, child.pid()).memory_map().expect("a memory map");
    let vma = memory.vma(address).expect("mapped");
    let error = if opens_by_mapping() { MemoryError::Fault(vma.range.start()) } else { MemoryError::Denied };
    assert_eq!(memory.open_file(&vma).err(), Some(error));
}

#[test]
fn kept_memory_disregards_protection_and_ends_with_a_hole() {
    let (child, clients) = (Child::start(), clients());
    let memory = call(&clients, child.pid()).memory_map().expect("a memory map");
    memory.write(child.at("private-read"), b"replaced").expect("as a device would");
    let mut bytes = [0; 8];
    memory.read(child.at("private-read"), &mut bytes).expect("readable");
    assert_eq!(&bytes, b"replaced");
    let hole = child.at("hole");
    assert_eq!(memory.read(hole, &mut bytes), Err(MemoryError::Fault(hole)));
}

#[test]
fn exec_ends_a_kept_memory_map_and_the_next_call_finds_the_new_one() {
    let (mut child, clients) = (Child::start(), clients());
    let old = call(&clients, child.pid()).memory_map().expect("a memory map");
    let address = child.at("private");
    child.exec();
    assert_eq!(old.vma(address), Err(MemoryError::Gone));
    assert_eq!(old.read(address, &mut [0; 8]), Err(MemoryError::Gone));
    assert_eq!(old.write(address, &[0; 8]), Err(MemoryError::Gone));
    let caller = call(&clients, child.pid());
    assert_eq!(caller.likely_memory_map().expect("the kept one").id(), old.id());
    let new = caller.memory_map().expect("the new memory map");
    assert_ne!(old.id(), new.id());
    let caller = call(&clients, child.pid());
    assert_eq!(caller.likely_memory_map().expect("the kept one").id(), new.id(), "what was found is kept");
    assert!(new.vma(child.at("private")).is_ok());
}

#[test]
fn exit_ends_a_kept_memory_map() {
    let (child, clients) = (Child::start(), clients());
    let memory = call(&clients, child.pid()).memory_map().expect("a memory map");
    let address = child.at("shared");
    assert!(memory.memlock_limit().is_some());
    drop(child);
    assert_eq!(memory.vma(address), Err(MemoryError::Gone));
    assert_eq!(memory.read(address, &mut [0; 8]), Err(MemoryError::Gone));
    assert_eq!(memory.memlock_limit(), None);
}

#[test]
fn file_behind_a_mapping_outlives_the_client() {
    let (child, clients) = (Child::start(), clients());
    let memory = call(&clients, child.pid()).memory_map().expect("a memory map");
    let kind = if opens_by_mapping() { "shared-anonymous" } else { "shared" };
    let vma = memory.vma(child.at(kind)).expect("mapped");
    let file = memory.open_file(&vma).expect("shared");
    drop(child);
    assert_eq!(&sys::bytes_at(&file.fd, vma.file.expect("a file").1), b"contents");
}

#[test]
fn limit_that_the_server_sets_counts_in_place_of_the_clients() {
    let (child, clients) = (Child::start(), clients().limited_to(Some(12_288)));
    let caller = call(&clients, child.pid());
    assert_eq!(caller.memlock_limit(), 12_288);
    let memory = caller.memory_map().expect("a memory map");
    assert_eq!(memory.memlock_limit(), Some(12_288));
    drop(child);
    assert_eq!(memory.memlock_limit(), None, "nobody is there to have a limit");
}

#[test]
fn capabilities_count_where_the_mount_is_owned() {
    // In a user namespace of its own a process has them all.
    let child = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "sh", "-c", "echo ready; read line"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("Skipped(there is no unshare)");
        return;
    };
    let mut line = [0; 6];
    if std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut line).is_err() {
        println!("Skipped(no user namespace is to be had)");
        return;
    }
    let inside = clients().judged_where(child.id().cast_signed());
    let capable = |clients: &Clients, pid| call(clients, pid).capable(Capability::IpcLock);
    assert!(!capable(&clients(), child.id()), "in the server's it has none");
    assert!(capable(&inside, child.id()), "it owns the mount");
    assert!(!capable(&inside, std::process::id()), "who is outside has none inside");
    drop(child.stdin.take());
    child.wait().expect("ended");
}

#[test]
fn threads_of_one_process_share_one_memory_map() {
    let (mut child, clients) = (Child::start(), clients());
    let tid = child.thread();
    let of_main = call(&clients, child.pid()).memory_map().expect("a memory map");
    let of_thread = call(&clients, tid).memory_map().expect("a memory map");
    assert_ne!(tid, child.pid());
    assert_eq!(of_main.id(), of_thread.id());
    assert_eq!(call(&clients, tid).pid(), child.pid());
}

#[test]
fn memory_map_found_by_a_thread_that_has_ended_is_that_of_the_process_still() {
    let (mut child, clients) = (Child::start(), clients());
    let tid = child.thread();
    let before = call(&clients, tid).memory_map().expect("a memory map");
    child.end_thread(tid);
    let next = child.thread();
    assert_eq!(call(&clients, next).memory_map().expect("a memory map").id(), before.id());
    assert_eq!(call(&clients, child.pid()).memory_map().expect("a memory map").id(), before.id());
}

#[test]
fn memory_map_of_two_processes_is_one_and_outlives_the_first() {
    let (mut child, clients) = (Child::start(), clients());
    let twin = child.twin();
    let map = call(&clients, child.pid()).memory_map().expect("a memory map");
    assert_eq!(call(&clients, twin.pid()).memory_map_id(), Ok(map.id()));
    let (private, shared) = (child.at("private"), child.at("shared"));
    drop(child);
    let survivor = call(&clients, twin.pid());
    assert_eq!(survivor.memory_map_id(), Ok(map.id()));
    let mut bytes = [0; 8];
    map.read(private, &mut bytes).expect("the memory is there");
    assert_eq!(&bytes, b"contents");
    let vma = map.vma(shared).expect("mapped");
    assert!(map.open_file(&vma).is_ok(), "the survivor is asked for the file");
    assert!(map.memlock_limit().is_some(), "and for its limit");
    drop((survivor, twin));
    while map.read(private, &mut bytes) != Err(MemoryError::Gone) {
        std::thread::yield_now();
    }
}

#[test]
fn memory_map_of_a_parent_is_the_one_that_its_child_called_with_before_it_ended() {
    let (mut child, clients) = (Child::start(), clients());
    let twin = child.twin();
    let map = call(&clients, twin.pid()).memory_map().expect("a memory map");
    twin.end();
    let vma = map.vma(child.at("shared")).expect("mapped");
    assert!(map.open_file(&vma).is_ok(), "the parent is asked for the file, though it has never called");
    let parent = call(&clients, child.pid());
    assert_eq!(parent.memory_map_id(), Ok(map.id()));
    let thread = child.thread();
    assert_eq!(call(&clients, thread).memory_map_id(), Ok(map.id()));
}

#[test]
fn parent_with_a_memory_map_of_its_own_is_not_taken_for_its_child() {
    let (child, clients) = (Child::start(), clients());
    let of_child = call(&clients, child.pid()).memory_map_id().expect("a memory map");
    assert_ne!(call(&clients, std::process::id()).memory_map_id(), Ok(of_child));
}

#[test]
fn exec_of_one_of_two_processes_with_one_memory_map_takes_it_to_another() {
    let (mut child, clients) = (Child::start(), clients());
    let twin = child.twin();
    let both = call(&clients, child.pid()).memory_map_id();
    assert_eq!(call(&clients, twin.pid()).memory_map_id(), both);
    child.exec();
    assert_ne!(call(&clients, child.pid()).memory_map_id(), both);
    assert_eq!(call(&clients, twin.pid()).memory_map_id(), both);
}

#[test]
fn descriptors_are_told_apart() {
    let (child, clients) = (Child::start(), clients());
    let caller = call(&clients, child.pid());
    let kind = |name: &str| caller.file(child.fd(name)).map(|file| (file.kind(), file.writable()));
    assert_eq!(kind("memfd"), Ok((FileKind::Shmem, true)));
    assert_eq!(kind("memfd-sealed"), Ok((FileKind::Shmem, false)));
    assert_eq!(kind("program"), Ok((FileKind::Writeback, false)));
    assert_eq!(kind("eventfd").map(|kind| kind.0), Ok(FileKind::Unpinnable));
    assert_eq!(kind("closed").map(|kind| kind.0), Err(FdError::Bad(child.fd("closed"))));
    assert!(caller.eventfd(child.fd("eventfd")).expect("open").is_some());
    assert!(caller.eventfd(child.fd("memfd")).expect("open").is_none());
    assert_eq!(caller.eventfd(-1).err(), Some(FdError::Bad(-1)));
}

#[test]
fn memlock_limit_is_the_callers_as_it_is_now() {
    let (mut child, clients) = (Child::start(), clients());
    child.tell("memlock 65536");
    let caller = call(&clients, child.pid());
    assert_eq!(caller.memlock_limit(), 65_536);
    child.tell("memlock 131072");
    assert_eq!(caller.memlock_limit(), 131_072);
    assert_eq!(caller.memory_map().expect("a memory map").memlock_limit(), Some(131_072));
}

#[test]
fn capabilities_count_in_the_servers_user_namespace_only() {
    if !nix::unistd::geteuid().is_root() {
        println!("Skipped(needs root: nobody here has a capability)");
        return;
    }
    let (mut child, clients) = (Child::start(), clients());
    assert!(call(&clients, child.pid()).capable(Capability::IpcLock));
    if child.tell("new-user-namespace") != "ok" {
        println!("Skipped(no user namespaces here)");
        return;
    }
    assert!(!call(&clients, child.pid()).capable(Capability::IpcLock), "almighty in a namespace of its own");
}

#[test]
fn memory_that_never_answers_holds_up_nobody_else_and_ends_with_its_owner() {
    let (mut stuck, other) = (Child::start(), Child::start());
    if !stuck.map_never_answered() {
        println!("Skipped(no userfaultfd here)");
        return;
    }
    let clients = Arc::new(clients());
    let (sender, receiver) = mpsc::channel();
    let reader = {
        let (clients, pid, address) = (Arc::clone(&clients), stuck.pid(), stuck.at("userfault"));
        std::thread::spawn(move || {
            let memory = call(&clients, pid).memory_map();
            sender.send(()).expect("the test listens");
            let answer = call(&clients, pid).read(address, &mut [0; 8]);
            drop(memory);
            answer
        })
    };
    receiver.recv_timeout(Duration::from_secs(10)).expect("the reader is on its way");
    let caller = call(&clients, other.pid());
    assert!(caller.memory_map().is_ok(), "another client is looked up");
    caller.read(other.at("private"), &mut [0; PAGE]).expect("another client is read");
    assert!(!reader.is_finished());
    drop(stuck);
    // It fails, or finds what the memory is without its userfaultfd: what counts is that it ends.
    let _ended = reader.join().expect("no panic");
}

#[test]
fn caller_without_a_visible_process_is_nobody() {
    let clients = clients();
    let caller = call(&clients, 0);
    assert_eq!(caller.memory_map().err(), Some(MemoryError::Denied));
    assert_eq!(caller.file(0).err(), Some(FdError::Denied));
    assert_eq!(caller.memlock_limit(), 0);
    assert!(!caller.capable(Capability::SysRawio));
    assert!(caller.read(UserAddr(0x1000), &mut [0; 8]).is_err());
}

/// Not a test: the child's life, when this program was started as one.
#[test]
fn child_life() {
    if std::env::var_os(child::MARK).is_some() {
        child::live();
    }
}
