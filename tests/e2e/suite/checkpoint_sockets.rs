//! Sockets of the internet protocols in a checkpoint.

use anyhow::{Context, Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Cmd, PYTHON, Test, case, ensure_eq, ensure_has, eventually};

use crate::checkpoint_ctr::{count, counts_past};
use crate::checkpoint_workloads::TELL;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(connections_within_go_on_and_clients_outside_stay_with_the_source)
            .except(Shim::Stock, "runc's shim saves no connections unless told to")
            .except(Shim::GpusnapRunc, "runc leaves the loopback device of a restored container down"),
        case!(sockets_at_the_containers_own_address_are_there_at_another_address)
            .except(Shim::Stock, "CRIU cannot bind a socket to an address that is gone")
            .except(Shim::GpusnapRunc, "runc leaves the loopback device of a restored container down"),
    ]
}

/// A server with a connection of its own to itself, an echo to its first client, and numbers for its second one, which
/// sends nothing more. Later clients are accepted on demand. The fate of the first two is in /fates.
const SERVER: &str = "
import socket
to_itself = socket.create_server(('127.0.0.1', 0))
a = socket.create_connection(to_itself.getsockname())
b = to_itself.accept()[0]
server = socket.create_server(('127.0.0.1', 18083))
tell('listens', '/listens')
echoed, told = [server.accept()[0] for _ in range(2)]
echoed.setblocking(False)
count, fates = 0, {}
def tried(name, work):
    try:
        work()
    except BlockingIOError:
        pass
    except OSError as error:
        fates.setdefault(name, error.strerror)
def echo():
    data = echoed.recv(100)
    echoed.sendall(data) if data else fates.setdefault('echoed', 'end')
while True:
    count += 1
    a.sendall(b'%08d' % count)
    assert b.recv(8) == b'%08d' % count
    tried('echoed', echo)
    tried('told', lambda: told.sendall(b'%08d' % count))
    if os.path.exists('/accept'):
        client = server.accept()[0]
        client.sendall(b'welcome')
        client.close()
        os.remove('/accept')
    tell(fates, '/fates')
    tell(count)
    time.sleep(0.02)
";

/// The server's clients, the third of which is not accepted. Prints their progress, and who was told of an end.
const CLIENTS: &str = "
import socket
echoed, told, waiting = [socket.create_connection(('127.0.0.1', 18083)) for _ in range(3)]
told.shutdown(socket.SHUT_WR)
number = 0
while True:
    number += 1
    try:
        echoed.sendall(b'%08d' % number)
        answer = echoed.recv(8, socket.MSG_WAITALL)
        if not answer:
            break
        assert answer == b'%08d' % number, answer
        assert len(told.recv(8, socket.MSG_WAITALL)) == 8
    except ConnectionError:
        break
    print('exchanged', number, flush=True)
for client in (told, waiting):
    try:
        while client.recv(100):
            pass
    except ConnectionError:
        pass
print('all told', flush=True)
";

fn connections_within_go_on_and_clients_outside_stay_with_the_source(t: &Test) -> Result<()> {
    let (old, new, image) = (t.id("old"), t.id("new"), t.id("checkpoint"));
    t.ctr().start_python(&old, &[], &format!("{TELL}{SERVER}"))?;
    eventually("the server to listen", || t.ctr().exec_prints(&old, "cat /listens"))?;
    let inside = |id: &str, program: &str| -> Result<Cmd> {
        let pid = t.ctr().pid(id)?.to_string();
        Ok(Cmd::new("nsenter").args(&["--net", "--target", &pid, "python3", "-c", program]).stdin_null())
    };
    let clients = inside(&old, CLIENTS)?.spawn()?;
    clients.sees("exchanged 5\n")?;
    t.ctr().checkpoint(&old, &image).ok()?;
    // With the source, everything goes on.
    let exchanged = || Ok::<_, anyhow::Error>(clients.stdout().lines().count());
    let so_far = exchanged()?;
    eventually("data to go both ways", || {
        let now = exchanged()?;
        ensure!(now > so_far + 5, "still {now}");
        Ok(())
    })?;
    ensure_eq!(t.ctr().exec_prints(&old, "cat /fates")?, "{}");

    t.ctr().checkpoint_task(&old, &["--exit"]).ok()?;
    clients.sees("all told").context("the clients of a container that ends")?;
    t.ctr().remove(&old)?;

    t.ctr().restore(&new, &image).ok()?;
    let now = count(t, &new)?;
    counts_past(t, &new, now + 2)?;
    let fates = t.ctr().exec_prints(&new, "cat /fates")?;
    ensure_eq!(fates, "{'echoed': 'end', 'told': 'Broken pipe'}");
    // Nobody waits to be accepted; the next client is.
    let welcome = "import socket; print(socket.create_connection(('127.0.0.1', 18083)).recv(9))";
    t.ctr().exec_prints(&new, "touch /accept")?;
    ensure_has!(inside(&new, welcome)?.ok()?.text(), "welcome");
    Ok(())
}

/// A listener, a connection of its own to itself, a connected UDP socket, and a connection that was reset, all at the
/// container's own address.
pub(crate) const AT_OWN_ADDRESS: &str = "
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(('192.0.2.1', 53))
me = udp.getsockname()[0]
server = socket.create_server((me, 8080))
server.setblocking(False)
to_itself = socket.create_server((me, 0))
a, reset = [socket.create_connection(to_itself.getsockname()) for _ in range(2)]
b, other = [to_itself.accept()[0] for _ in range(2)]
other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
other.close()
count = 0
while True:
    count += 1
    a.sendall(b'%08d' % count)
    assert b.recv(8) == b'%08d' % count
    try:
        client = server.accept()[0]
        client.sendall(b'hello')
        client.close()
    except BlockingIOError:
        pass
    tell(udp.getsockname()[0], '/address')
    tell(count)
    time.sleep(0.02)
";

fn sockets_at_the_containers_own_address_are_there_at_another_address(t: &Test) -> Result<()> {
    let name = t.id("c");
    let options = [&["--detach", "--net", "bridge"], t.nerdctl().ends_on_checkpoint()].concat();
    let program = format!("{TELL}{AT_OWN_ADDRESS}");
    t.nerdctl().run_image(PYTHON, &name, &options, &["python3", "-c", &program]).ok()?;
    let counts = || -> Result<u64> {
        eventually("a number in /count", || Ok(t.nerdctl().exec_prints(&name, "cat /count")?.parse()?))
    };
    let before = counts()?;
    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    t.nerdctl().becomes(&name, "exited")?;
    t.nerdctl().restored(&name, "one")?;
    let address = || -> Result<String> {
        let all = t.nerdctl().inspect(&name)?;
        Ok(all.pointer("/NetworkSettings/IPAddress").and_then(|a| a.as_str()).context("no address")?.to_owned())
    };
    eventually("further counts", || {
        let now = counts()?;
        ensure!(now > before + 3, "still {now}");
        Ok(())
    })?;
    let address = address()?;
    ensure_eq!(t.nerdctl().exec_prints(&name, "cat /address")?, address);
    let client = format!("exec 3<>/dev/tcp/{address}/8080; cat <&3");
    ensure_eq!(Cmd::new("bash").args(&["-c", &client]).stdin_null().ok()?.trimmed(), "hello");
    Ok(())
}
