//! Connections of a container through a checkpoint and a restore.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use e2e::target::Shim;
use e2e::{Case, PYTHON, Test, case, ensure_eq, eventually};

use crate::nerdctl_life::nerdctl_cases;

pub(crate) fn cases() -> Vec<Case> {
    let refused = "runc drives CRIU, which takes all connections or none";
    nerdctl_cases(vec![
        case!(connections_within_a_container_go_on_and_those_to_elsewhere_are_closed_when_restored)
            .except(Shim::Stock, refused)
            .except(Shim::GpusnapRunc, refused),
        case!(the_other_end_of_a_connection_hears_of_the_end_of_a_saved_container)
            .except(Shim::Stock, refused)
            .except(Shim::GpusnapRunc, refused),
    ])
}

/// Talks to itself over the loopback and over its own address, counting; echoes what is sent to port 8080, and to port
/// 8082 of its own address; accepts on port 8081 only when told. A connection to an address that nobody has is half
/// open. A datagram socket is bound to its own address and connected to the gateway.
const PROGRAM: &str = "
import os, socket, threading, time
def note(name, text):
    with open(name + '.new', 'w') as file:
        file.write(str(text))
    os.rename(name + '.new', name)
def serve(port, address='0.0.0.0'):
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen(8)
    return server
def echo(connection):
    try:
        while data := connection.recv(100):
            connection.sendall(data)
        note('/ended', 'by the end of the stream')
    except OSError as error:
        note('/ended', repr(error))
def accept(server):
    while True:
        threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
threading.Thread(target=accept, args=(serve(8080),), daemon=True).start()
late = serve(8081)
def accept_late():
    while not os.path.exists('/accept'):
        time.sleep(0.02)
    accept(late)
threading.Thread(target=accept_late, daemon=True).start()
inner = socket.create_server(('127.0.0.1', 0))
near = socket.create_connection(inner.getsockname())
far = inner.accept()[0]
me = socket.gethostbyname(socket.gethostname())
threading.Thread(target=accept, args=(serve(8082, me),), daemon=True).start()
own = socket.create_connection((me, 8082))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind((me, 0))
datagrams.connect((me.rsplit('.', 1)[0] + '.1', 53))
half = socket.socket()
half.setblocking(False)
half.connect_ex((os.environ['NOBODY'], 9))
count = 0
while True:
    count += 1
    near.sendall(b'%08d' % count)
    assert far.recv(8) == b'%08d' % count
    far.sendall(b'ok')
    assert near.recv(2) == b'ok'
    own.sendall(b'own')
    assert own.recv(3) == b'own'
    try:
        datagrams.send(b'nobody listens')
    except ConnectionRefusedError:
        pass
    note('/count', count)
    time.sleep(0.02)
";

/// An address of the bridge's network that nobody has, in the bed's own range (testbed's README).
const NOBODY: &str = "NOBODY=10.4.0.251";

fn start(t: &Test, name: &str) -> Result<()> {
    let options = [t.nerdctl().ends_on_checkpoint(), &["--detach", "--net", "bridge", "--env", NOBODY]].concat();
    t.nerdctl().run_image(PYTHON, name, &options, &["python3", "-c", PROGRAM]).ok()?;
    counts(t, name)
}

/// Waits until the connection of the container with itself has gone on.
fn counts(t: &Test, name: &str) -> Result<()> {
    let count = || -> Result<u64> { Ok(t.nerdctl().exec_prints(name, "cat /count")?.parse()?) };
    let mut from = None;
    eventually("the container to talk to itself", || {
        let now = count()?;
        let from = *from.get_or_insert(now);
        ensure!(now > from + 3, "{now} rounds, after {from}");
        Ok(())
    })
}

fn connect(t: &Test, name: &str, port: u16) -> Result<TcpStream> {
    let all = t.nerdctl().inspect(name)?;
    let address = all.pointer("/NetworkSettings/IPAddress").and_then(|a| a.as_str()).context("no address")?;
    let stream = eventually("a connection", || Ok(TcpStream::connect((address, port))?))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

fn echoes(stream: &mut TcpStream, text: &str) -> Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    ensure_eq!(String::from_utf8(answer)?, text);
    Ok(())
}

fn connections_within_a_container_go_on_and_those_to_elsewhere_are_closed_when_restored(t: &Test) -> Result<()> {
    let name = t.id("c");
    start(t, &name)?;
    let mut client = connect(t, &name, 8080)?;
    echoes(&mut client, "before")?;
    let _waits = connect(t, &name, 8081)?;
    // The source keeps what it has, whichever way data was under way.
    client.write_all(b"mean")?;
    t.ctr().checkpoint_task(&t.nerdctl().id(&name)?, &[]).ok()?;
    client.write_all(b"while")?;
    let mut answer = [0; 9];
    client.read_exact(&mut answer)?;
    ensure_eq!(&answer, b"meanwhile");
    counts(t, &name)?;

    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    t.nerdctl().becomes(&name, "exited")?;
    t.nerdctl().restored(&name, "one")?;
    counts(t, &name)?;
    eventually("the connection to be closed", || {
        ensure_eq!(t.nerdctl().exec_prints(&name, "cat /ended")?, "by the end of the stream");
        Ok(())
    })?;
    echoes(&mut connect(t, &name, 8080)?, "afterwards")?;
    // nerdctl gives another address at each start.
    echoes(&mut connect(t, &name, 8082)?, "on the new address")?;
    let mut waits = connect(t, &name, 8081)?;
    t.nerdctl().exec_prints(&name, "touch /accept")?;
    echoes(&mut waits, "late")
}

fn the_other_end_of_a_connection_hears_of_the_end_of_a_saved_container(t: &Test) -> Result<()> {
    let name = t.id("c");
    start(t, &name)?;
    let mut client = connect(t, &name, 8080)?;
    echoes(&mut client, "before")?;
    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    let told = match client.read(&mut [0; 10]) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => Err(anyhow::anyhow!("the client hears {other:?}")),
    };
    let _ = client.shutdown(Shutdown::Both);
    told
}
