package testslave

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

//go:embed slave.py
var script string

// python is Debian's: pymodbus is installed for it, not for another on the PATH.
const python = "/usr/bin/python3"

// ErrMissing is wrapped by the error of [New] where the slave cannot run on
// this machine.
var ErrMissing = errors.New("python3-pymodbus is not installed: apt-get install python3-pymodbus")

// Slave is a running slave. Its methods may be called from several goroutines.
type Slave struct {
	// Addr is its host:port; a restart keeps it.
	Addr string

	mu struct {
		sync.Mutex
		cmd *exec.Cmd // nil after Kill
		in  io.WriteCloser
		out *bufio.Reader
	}
}

// Start runs a slave on a free port until the test ends. The test is skipped
// where python3-pymodbus is missing.
func Start(t testing.TB) *Slave {
	t.Helper()
	s, err := New()
	if errors.Is(err, ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	return s
}

// New runs a slave on a free port until Kill.
func New() (*Slave, error) {
	s := &Slave{}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.startLocked(0); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Slave) startLocked(port int) error {
	if out, err := exec.Command(python, "-c", "import pymodbus.server").CombinedOutput(); err != nil {
		return fmt.Errorf("%w (%w: %s)", ErrMissing, err, lastLine(out))
	}
	cmd := exec.Command(python, "-c", script, "--port", strconv.Itoa(port))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.mu.cmd, s.mu.in, s.mu.out = cmd, in, bufio.NewReader(out)
	line, err := s.mu.out.ReadString('\n')
	words := strings.Fields(line)
	if err != nil || len(words) != 3 || words[0] != "listening" {
		s.killLocked()
		return fmt.Errorf("slave said %q instead of its port: %w", line, err)
	}
	s.Addr = net.JoinHostPort(words[1], words[2])
	return nil
}

func lastLine(b []byte) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}

// Kill ends the slave at once, as a power cut would.
func (s *Slave) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.killLocked()
}

func (s *Slave) killLocked() {
	if s.mu.cmd == nil {
		return
	}
	_ = s.mu.cmd.Process.Kill() // it may have ended by itself
	_ = s.mu.cmd.Wait()
	s.mu.cmd = nil
}

// Restart runs the slave again on its port, killing it first if it runs. All
// registers are 0 then, nothing is refused and it is not paused.
func (s *Slave) Restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.killLocked()
	_, port, err := net.SplitHostPort(s.Addr)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return err
	}
	return s.startLocked(n)
}

// Set changes registers or bits from an address on, as the device would. It
// panics where the slave does not run, as do the methods below: tests want no
// error to check at every line.
func (s *Slave) Set(table string, address int, values ...uint16) {
	var b strings.Builder
	for _, v := range values {
		fmt.Fprintf(&b, " %d", v)
	}
	s.command("set %s %d%s", table, address, b.String())
}

// Get reads count registers or bits from an address on; one where count is left out.
func (s *Slave) Get(table string, address int, count ...int) []uint16 {
	n := 1
	if len(count) > 0 {
		n = count[0]
	}
	words := s.command("get %s %d %d", table, address, n)
	out := make([]uint16, len(words))
	for i, w := range words {
		v, err := strconv.ParseUint(w, 10, 16)
		if err != nil {
			panic(fmt.Sprintf("testslave: get %s %d: %v", table, address, err))
		}
		out[i] = uint16(v)
	}
	return out
}

// Writes is how often Modbus clients have written the address since the start.
func (s *Slave) Writes(table string, address int) int {
	return int(s.number("writes %s %d", table, address))
}

// Reads is how many requests of Modbus clients have read the address.
func (s *Slave) Reads(table string, address int) int {
	return int(s.number("reads %s %d", table, address))
}

// When is when a Modbus client last wrote the address; zero if none did.
func (s *Slave) When(table string, address int) time.Time {
	n := s.number("when %s %d", table, address)
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// Pause swallows requests without an answer until Resume.
func (s *Slave) Pause() { s.command("pause") }

// Resume answers again; what came while paused stays unanswered.
func (s *Slave) Resume() { s.command("resume") }

// Refuse answers "illegal data address" to every request that touches the address.
func (s *Slave) Refuse(table string, address int) { s.command("refuse %s %d", table, address) }

// Allow ends Refuse.
func (s *Slave) Allow(table string, address int) { s.command("allow %s %d", table, address) }

func (s *Slave) number(format string, args ...any) int64 {
	n, err := strconv.ParseInt(s.command(format, args...)[0], 10, 64)
	if err != nil {
		panic("testslave: " + err.Error())
	}
	return n
}

// command sends a line and gives the words of the answer after "ok".
func (s *Slave) command(format string, args ...any) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := fmt.Sprintf(format, args...)
	if s.mu.cmd == nil {
		panic("testslave: " + line + ": the slave was killed")
	}
	if _, err := io.WriteString(s.mu.in, line+"\n"); err != nil {
		panic("testslave: " + line + ": " + err.Error())
	}
	answer, err := s.mu.out.ReadString('\n')
	words := strings.Fields(answer)
	if err != nil || len(words) == 0 || words[0] != "ok" {
		panic(fmt.Sprintf("testslave: %s: %q, %v", line, answer, err))
	}
	return words[1:]
}
