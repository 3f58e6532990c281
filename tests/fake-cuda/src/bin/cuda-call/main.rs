//! Makes one CUDA checkpoint call on a process, through the dynamic linker's libcuda.so.1:
//! simulated or real.

#![deny(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

#[allow(unsafe_code)]
mod sys;

const USAGE: &str = "\
usage: cuda-call state|tid|checkpoint|unlock PID
       cuda-call lock PID [MILLISECONDS]       0, the default, waits without limit
       cuda-call restore PID [OLD=NEW]...      UUIDs of GPUs, as `cuda-call gpus` prints them
       cuda-call gpus                          what NVML says of GPUs, and who uses them
The exit status is 0 when the driver's result is, 1 when it is not, 2 when there was no call.";

const STATES: [&str; 4] = ["RUNNING", "LOCKED", "CHECKPOINTED", "FAILED"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match call(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

/// Makes the call, prints a line and returns the result.
fn call(arguments: &[&str]) -> Result<u32, String> {
    let (operation, pid, rest) = match arguments {
        ["gpus"] => return gpus(),
        [operation, pid, rest @ ..] => (*operation, pid.parse::<i32>().map_err(|_| USAGE)?, rest),
        _ => return Err(USAGE.to_owned()),
    };
    let driver = sys::Library::load("libcuda.so.1")?;
    let begin = Instant::now();
    let (result, note) = match (operation, rest) {
        ("state", []) => {
            let (result, state) = driver.ask("cuCheckpointProcessGetState", pid)?;
            let name = usize::try_from(state).ok().and_then(|state| STATES.get(state)).unwrap_or(&"?");
            (result, if result == 0 { format!("state={state} {name} ") } else { String::new() })
        }
        ("tid", []) => {
            let (result, thread) = driver.ask("cuCheckpointProcessGetRestoreThreadId", pid)?;
            (result, if result == 0 { format!("tid={thread} ") } else { String::new() })
        }
        ("lock", [] | [_]) => {
            let limit: u64 = rest.first().unwrap_or(&"0").parse().map_err(|_| USAGE)?;
            (driver.change("cuCheckpointProcessLock", pid, [limit, 0])?, String::new())
        }
        ("checkpoint", []) => (driver.change("cuCheckpointProcessCheckpoint", pid, [0, 0])?, String::new()),
        ("unlock", []) => (driver.change("cuCheckpointProcessUnlock", pid, [0, 0])?, String::new()),
        ("restore", pairs) => {
            let pairs: Vec<sys::Pair> = pairs.iter().map(|pair| parse_pair(pair)).collect::<Result<_, _>>()?;
            (driver.restore(pid, &pairs)?, String::new())
        }
        _ => return Err(USAGE.to_owned()),
    };
    println!("{operation} pid={pid} {note}rc={result} {:.3}s", begin.elapsed().as_secs_f64());
    Ok(result)
}

fn gpus() -> Result<u32, String> {
    let nvml = sys::Library::load("libnvidia-ml.so.1")?;
    for gpu in nvml.gpus()? {
        println!("{} minor={} processes={:?}", gpu.uuid, gpu.minor, gpu.processes);
    }
    Ok(0)
}

fn parse_pair(text: &str) -> Result<sys::Pair, String> {
    let (old, new) = text.split_once('=').ok_or(USAGE)?;
    Ok(sys::Pair { old: parse_uuid(old)?, new: parse_uuid(new)? })
}

fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let wrong = || format!("{text}: not the UUID of a GPU");
    let digits: String = text.strip_prefix("GPU-").unwrap_or(text).chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 {
        return Err(wrong());
    }
    Ok(u128::from_str_radix(&digits, 16).map_err(|_| wrong())?.to_be_bytes())
}
