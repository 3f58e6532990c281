//! A program that uses a GPU by orders on standard input, one command and one answer a line: the
//! tests' target.

#![deny(unsafe_code)]

use std::io::{self, BufRead, Write};
use std::time::Duration;

#[allow(unsafe_code)]
mod sys;

/// Commands and their actions; the answer is `ok`, `ok VALUE`, `error CODE` (a CUresult) or `wrong
/// WHAT`.
const HELP: &str = "\
init                    cuInit
count                   the number of GPUs
start ORDINAL WORDS     a context, and memory with a pattern
add                     adds one to every value, and waits
check                   whether every value is its pattern plus the additions
pinned BYTES            page-locked memory with a pattern, which check checks, too
managed                 managed memory
unmanaged               frees that
spin MILLISECONDS       a kernel that runs so long; does not wait
sync                    waits
uuid ORDINAL            of a GPU, as 32 digits
lookup NAME VERSION     cuGetProcAddress: the result, the status, whether there is an address
fork                    forks a child that sleeps; its pid
fork-init               forks a child; what cuInit gives there";

fn main() -> io::Result<()> {
    let mut program = match sys::Program::load() {
        Ok(program) => program,
        Err(error) => return Err(io::Error::other(error)),
    };
    let mut output = io::stdout();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        writeln!(output, "{}", answer(&mut program, &words))?;
        output.flush()?;
    }
    Ok(())
}

fn answer(program: &mut sys::Program, words: &[&str]) -> String {
    let number = |text: &str| text.parse::<u32>().unwrap_or_default();
    let result = match words {
        ["init"] => program.init(),
        ["count"] => return value(program.count()),
        ["start", ordinal, words] => program.start(number(ordinal), number(words)),
        ["add"] => program.add(),
        ["check"] => match program.check() {
            Ok(None) => Ok(()),
            Ok(Some(wrong)) => return format!("wrong {wrong}"),
            Err(code) => Err(code),
        },
        ["pinned", bytes] => program.pinned(number(bytes)),
        ["managed"] => program.managed(),
        ["unmanaged"] => program.unmanaged(),
        ["spin", milliseconds] => program.spin(Duration::from_millis(number(milliseconds).into())),
        ["sync"] => program.synchronize(),
        ["uuid", ordinal] => return value(program.uuid(number(ordinal))),
        ["lookup", name, version] => return format!("ok {}", program.look_up(name, number(version))),
        ["fork"] => return format!("ok {}", sys::fork_sleeper()),
        ["fork-init"] => return format!("ok {}", program.init_in_child()),
        _ => return HELP.to_owned(),
    };
    match result {
        Ok(()) => "ok".to_owned(),
        Err(code) => format!("error {code}"),
    }
}

fn value<T: std::fmt::Display>(result: Result<T, u32>) -> String {
    match result {
        Ok(value) => format!("ok {value}"),
        Err(code) => format!("error {code}"),
    }
}
