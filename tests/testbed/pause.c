/* Does nothing, reaps its children, ends on SIGTERM or SIGINT. It is the pause container of the CRI sandboxes, and
 * process 1 of the test bed's own pid namespace: there it reaps orphans at once (criu needs their pids free), and
 * killing it kills everything in the bed. */
#include <signal.h>
#include <stddef.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
	sigset_t set;
	int sig;

	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	for (;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (sigwait(&set, &sig) == 0 && sig != SIGCHLD)
			return 0;
	}
}
