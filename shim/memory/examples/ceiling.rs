//! What the engine reaches beside what the machine can do: reading and writing the memory of another process without
//! files and checksums.
//!
//! ```text
//! cargo run --release -p memory --example ceiling -- [GIGABYTES] [THREADS] [FOLDER] [ROUNDS]
//! ```
//!
//! Packs are written to FOLDER, `/var/tmp` unless given. The memory belongs to other processes, in huge pages where the
//! system lets those who ask have them; `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the environment gives small ones.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memory::{
    CHUNK, Control, Destination, Draft, FileSource, MAX_PACK_DATA, Pack, Process, Regions, Saved, Segment,
    SegmentTable, fill, save_files, save_processes, verify,
};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::{TimeSpec, TimeVal};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use proc::{ContainerPid, ProcessIds, Range};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const BUFFER: u64 = 256 << 10;
const HUGE: u64 = 2 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, bytes, content] = arguments.as_slice()
        && role == "hold"
    {
        return hold(bytes.parse()?, content == "noise");
    }
    let argument = |index: usize| arguments.get(index).map(String::as_str);
    let size = argument(0).unwrap_or("1").parse::<u64>()? << 30;
    let threads = argument(1).map(str::parse::<NonZeroUsize>).transpose()?;
    let threads = threads.unwrap_or_else(|| Control::new().threads());
    let folder = PathBuf::from(argument(2).unwrap_or("/var/tmp")).join(format!("ceiling-{}", std::process::id()));
    let rounds = argument(3).unwrap_or("5").parse()?;
    println!("{} GiB, {threads} threads, best and median of {rounds} rounds\n", size >> 30);
    std::fs::create_dir(&folder)?;
    let measured = Bench { size, threads, folder: folder.clone(), table: Table::default() }.run(rounds);
    std::fs::remove_dir_all(&folder)?;
    measured?.print(size)
}

/// The role of a process that has memory and waits until its parent is gone.
fn hold(bytes: u64, noise: bool) -> Result<()> {
    let length = usize::try_from(bytes)?;
    let mut memory = vec![0_u8; length + usize::try_from(HUGE)?];
    let begin = memory.as_ptr().align_offset(usize::try_from(HUGE)?);
    if noise {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in memory[begin..begin + length].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    println!("{}", memory[begin..].as_ptr().addr());
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(memory);
    Ok(())
}

/// A process with memory; it ends with this value.
struct Holder {
    child: Child,
    pid: i32,
    address: u64,
    _input: Option<ChildStdin>,
}

impl Holder {
    fn start(bytes: u64, content: &str) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        if std::env::var_os("GLIBC_TUNABLES").is_none() {
            command.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
        }
        let mut child =
            command.args(["hold", &bytes.to_string(), content]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
        let pid = i32::try_from(child.id())?;
        Ok(Self { pid, address: line.trim().parse()?, _input: child.stdin.take(), child })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        let _ = waitpid(Pid::from_raw(self.pid), None);
        let _ = self.child.stdout.take();
    }
}

/// What was measured, in the order in which it was first done.
#[derive(Default)]
struct Table(Vec<Row>);

struct Row {
    what: &'static str,
    /// How long each round took.
    seconds: Vec<f64>,
    /// What each took of all processors, which other work on the machine disturbs less.
    processor: Vec<f64>,
}

impl Table {
    fn time<T>(&mut self, what: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let (begin, processor) = (Instant::now(), processor_seconds()?);
        let result = work()?;
        let (seconds, processor) = (begin.elapsed().as_secs_f64(), processor_seconds()? - processor);
        if !self.0.iter().any(|row| row.what == what) {
            self.0.push(Row { what, seconds: Vec::new(), processor: Vec::new() });
        }
        for row in self.0.iter_mut().filter(|row| row.what == what) {
            row.seconds.push(seconds);
            row.processor.push(processor);
        }
        Ok(result)
    }

    fn print(mut self, size: u64) -> Result<()> {
        let gigabytes = f64::from(u32::try_from(size >> 20)?) * 1.048_576e-3;
        println!("{:50} {:>9} {:>9}   {:>9} {:>9}", "", "GB/s best", "median", "CPU s/GB", "median");
        for Row { what, seconds, processor } in &mut self.0 {
            seconds.sort_by(f64::total_cmp);
            processor.sort_by(f64::total_cmp);
            let middle = seconds.len() / 2;
            let [best, median] = [seconds[0], seconds[middle]].map(|seconds| gigabytes / seconds);
            let [least, usual] = [processor[0], processor[middle]].map(|seconds| seconds / gigabytes);
            println!("{what:50} {best:9.2} {median:9.2}   {least:9.3} {usual:9.3}");
        }
        Ok(())
    }
}

fn processor_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds = |time: TimeVal| Duration::from(TimeSpec::new(time.tv_sec(), time.tv_usec() * 1000)).as_secs_f64();
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

struct Bench {
    size: u64,
    threads: NonZeroUsize,
    folder: PathBuf,
    table: Table,
}

impl Bench {
    fn run(mut self, rounds: usize) -> Result<Table> {
        let source = Holder::start(self.size, "noise")?;
        for _ in 0..rounds {
            self.saving(&source)?;
            self.filling(&source)?;
        }
        Ok(self.table)
    }

    fn saving(&mut self, source: &Holder) -> Result<()> {
        let Self { size, threads, .. } = *self;
        self.table.time("read: process_vm_readv into a buffer", || {
            spread(threads, size, |_, offset, buffer| read(source.pid, source.address + offset, buffer))
        })?;
        let plain = self.emptied("plain")?;
        self.table.time("read, and written to files", || {
            spread(threads, size, |window, offset, buffer| {
                read(source.pid, source.address + offset, buffer)?;
                let file =
                    File::options().create(true).write(true).truncate(false).open(plain.join(window.to_string()))?;
                Ok(file.write_all_at(buffer, offset % MAX_PACK_DATA)?)
            })
        })?;
        std::fs::remove_dir_all(plain)?;
        Ok(())
    }

    fn save(&mut self, source: &Holder) -> Result<Saved> {
        let draft = Draft { folder: self.emptied("packs")?, prefix: "pack".into() };
        let range = Range { start: source.address, end: source.address + self.size };
        let target = Regions { process: ids(source.pid)?, ranges: vec![range] };
        let control = Control::with_threads(self.threads);
        self.table.time("SAVE from the process", || Ok(save_processes(&[target], CHUNK, &draft, &control)?))
    }

    fn filling(&mut self, source: &Holder) -> Result<()> {
        let Self { size, threads, .. } = *self;
        let saved = self.save(source)?;
        let packs = saved.packs.iter().map(|path| Pack::open(path)).collect::<std::result::Result<Vec<_>, _>>()?;
        self.table.time("VERIFY", || Ok(verify(&packs, &Control::with_threads(threads))?))?;

        let target = Holder::start(size, "nothing")?;
        for what in ["write: process_vm_writev into fresh memory", "write: into memory that is there"] {
            self.table.time(what, || {
                spread(threads, size, |_, offset, buffer| write(target.pid, target.address + offset, buffer))
            })?;
        }
        drop(target);
        let target = Holder::start(size, "nothing")?;
        for what in ["read from packs, and written into fresh memory", "read from packs, and written, memory is there"]
        {
            self.table.time(what, || {
                spread(threads, size, |window, offset, buffer| {
                    packs[window].file().read_exact_at(buffer, offset % MAX_PACK_DATA)?;
                    write(target.pid, target.address + offset, buffer)
                })
            })?;
        }
        drop(target);
        let target = Holder::start(size, "nothing")?;
        let table = moved(&saved, source, &target)?;
        let destination = Destination { processes: &[ids(target.pid)?], ready: &|_| () };
        for what in ["FILL fresh memory", "FILL, memory is there", "FILL from a disk, memory is there"] {
            if what.contains("disk") {
                for pack in &packs {
                    pack.file().sync_all()?;
                    rustix::fs::fadvise(pack.file(), 0, None, rustix::fs::Advice::DontNeed)?;
                }
            }
            self.table.time(what, || Ok(fill(&table, &packs, &destination, &Control::with_threads(threads))?))?;
        }
        drop(target);
        self.saving_files(&packs)
    }

    fn saving_files(&mut self, packs: &[Pack]) -> Result<()> {
        verify(packs, &Control::with_threads(self.threads))?;
        let sources: Vec<_> = (1..)
            .zip(packs)
            .map(|(number, pack)| FileSource {
                file: pack.file(),
                path: pack.path(),
                offset: 0,
                pid: FIRST,
                address: number * MAX_PACK_DATA,
                length: pack.data_length(),
            })
            .collect();
        let draft = Draft { folder: self.emptied("files")?, prefix: "pack".into() };
        let control = Control::with_threads(self.threads);
        self.table.time("SAVE from files, nothing twice", || Ok(save_files(&sources, &draft, &control)?))?;
        std::fs::remove_dir_all(&draft.folder)?;
        Ok(())
    }

    fn emptied(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        if Path::exists(&folder) {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir(&folder)?;
        Ok(folder)
    }
}

fn moved(saved: &Saved, from: &Holder, to: &Holder) -> Result<SegmentTable> {
    let there = |segment: &Segment| Segment { address: segment.address - from.address + to.address, ..*segment };
    let segments = saved.table.segments(FIRST).iter().map(there).collect();
    Ok(SegmentTable::new(saved.table.packs().to_vec(), vec![Process { pid: FIRST, segments }])?)
}

/// Does something with each part of the memory, each window of 256 MiB on one thread.
fn spread(threads: NonZeroUsize, size: u64, work: impl Fn(usize, u64, &mut [u8]) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicU64::new(0);
    let run = || -> Result<()> {
        let mut buffer = vec![1; usize::try_from(BUFFER)?];
        loop {
            let window = next.fetch_add(1, Ordering::Relaxed);
            let begin = window * MAX_PACK_DATA;
            if begin >= size {
                return Ok(());
            }
            let mut offset = begin;
            while offset < size.min(begin + MAX_PACK_DATA) {
                work(usize::try_from(window)?, offset, &mut buffer)?;
                offset += BUFFER;
            }
        }
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads.get()).map(|_| scope.spawn(run)).collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| "a thread panicked")?)
    })
}

/// The only process of a table.
const FIRST: ContainerPid = ContainerPid::new(1).expect("1 is a pid");

fn ids(host: i32) -> Result<ProcessIds> {
    Ok(ProcessIds { host: host.try_into()?, container: FIRST })
}

fn read(pid: i32, address: u64, buffer: &mut [u8]) -> Result<()> {
    let remote = RemoteIoVec { base: usize::try_from(address)?, len: buffer.len() };
    let copied = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(buffer)], &[remote])?;
    if copied == remote.len { Ok(()) } else { Err("a short read".into()) }
}

fn write(pid: i32, address: u64, buffer: &[u8]) -> Result<()> {
    let remote = RemoteIoVec { base: usize::try_from(address)?, len: buffer.len() };
    let copied = process_vm_writev(Pid::from_raw(pid), &[IoSlice::new(buffer)], &[remote])?;
    if copied == remote.len { Ok(()) } else { Err("a short write".into()) }
}
