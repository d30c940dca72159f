// Package machine tells the benchmarks what they run on and what a process has
// used: memory, CPU time, bytes written.
//
//	fmt.Println(machine.Describe())
//	before, err := machine.MemoryOf(pid)
package machine

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// Machine is what figures were measured on.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory string `json:"memory"`
	OS     string `json:"os"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

func (m Machine) String() string {
	return strings.Join([]string{m.CPU, fmt.Sprintf("%d cores", m.Cores), m.Memory, m.OS, "Linux " + m.Kernel, m.Go}, ", ")
}

// Describe reads what this machine is.
func Describe() Machine {
	m := Machine{CPU: "unknown CPU", Cores: runtime.NumCPU(), Go: runtime.Version()}
	if v := field("/proc/cpuinfo", "model name", ":"); v != "" {
		m.CPU = v
	}
	if kb, err := strconv.ParseFloat(strings.TrimSuffix(field("/proc/meminfo", "MemTotal", ":"), " kB"), 64); err == nil {
		m.Memory = fmt.Sprintf("%.0f GiB", kb/(1<<20))
	}
	m.OS = strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`)
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(b))
	}
	return m
}

func field(path, key, sep string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		k, v, ok := strings.Cut(s.Text(), sep)
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func proc(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// Memory is one process's share, in kB.
type Memory struct{ PSS, Anon, RSS float64 }

// MemoryOf reads smaps_rollup.
func MemoryOf(pid int) (Memory, error) {
	path := proc(pid, "smaps_rollup")
	if _, err := os.Stat(path); err != nil {
		return Memory{}, err
	}
	get := func(key string) float64 {
		v, _ := strconv.ParseFloat(strings.TrimSuffix(field(path, key, ":"), " kB"), 64)
		return v
	}
	return Memory{PSS: get("Pss"), Anon: get("Anonymous"), RSS: get("Rss")}, nil
}

// CPUOf is the CPU time that a process has used, in seconds.
func CPUOf(pid int) (float64, error) {
	b, err := os.ReadFile(proc(pid, "stat"))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	u, err1 := strconv.ParseFloat(f[11], 64)
	s, err2 := strconv.ParseFloat(f[12], 64)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%s: unexpected form", b)
	}
	return (u + s) / hz, nil
}

const hz = 100 // USER_HZ is 100 on every architecture that Go runs on

// CPU is the CPU time that all of the machine has used, in seconds.
func CPU() (float64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	f := strings.Fields(string(line))
	if len(f) < 9 {
		return 0, fmt.Errorf("/proc/stat: %q: unexpected form", line)
	}
	sum := 0.0
	for _, i := range []int{1, 2, 3, 6, 7, 8} { // all but idle and iowait
		v, err := strconv.ParseFloat(f[i], 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		sum += v
	}
	return sum / hz, nil
}

// WrittenOf is how many bytes a process has sent to block devices: write_bytes
// of /proc/PID/io. A tmpfs counts nothing there.
func WrittenOf(pid int) (float64, error) {
	path := proc(pid, "io")
	v, err := strconv.ParseFloat(field(path, "write_bytes", ":"), 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}
