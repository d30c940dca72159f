package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/tools/stack"
)

// patience is how long a test waits for what must come. It is no measurement:
// the machine may be busy.
const patience = 60 * time.Second

// fab is the control plane and the cloud that all tests share. Tests that kill
// the cloud put it back.
var fab *stack.Stack

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	bin := os.Getenv("FAIRLEAD_BIN")
	if bin == "" {
		fmt.Println("SKIP end-to-end tests: FAIRLEAD_BIN is not set; `go tool task test:e2e` builds the binaries and sets it")
		return 0
	}
	for _, p := range []string{"mosquitto_sub", "mosquitto_pub"} {
		if _, err := exec.LookPath(p); err != nil {
			fmt.Printf("SKIP end-to-end tests: %s is not installed: apt-get install mosquitto-clients\n", p)
			return 0
		}
	}
	dir, err := os.MkdirTemp("", "fairlead-e2e-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	keep := false
	defer func() {
		if keep || os.Getenv("FAIRLEAD_E2E_KEEP") != "" {
			fmt.Println("logs and data are kept in", dir)
			return
		}
		_ = os.RemoveAll(dir)
	}()
	repo, err := filepath.Abs("../..")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if fab, err = stack.New(stack.Config{Bin: bin, Dir: dir, Repo: repo}); err != nil {
		fmt.Println(err)
		return 1
	}
	defer fab.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	began := time.Now()
	if err := fab.StartCluster(ctx); err != nil {
		fmt.Println(err)
		return 1
	}
	port, err := stack.FreePort()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	cloudWS = fmt.Sprintf("ws://127.0.0.1:%d/mqtt", port)
	cloudArgs = append(cloudArgs, "--mqtt", cloudWS)
	if err := fab.StartCloud(ctx, cloudArgs...); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("control plane and cloud are up after %s\n", time.Since(began).Round(100*time.Millisecond))
	// Those that run side by side wait for lines most of the time.
	if err := flag.Set("test.parallel", "4"); err != nil {
		fmt.Println(err)
		return 1
	}
	code := m.Run()
	keep = code != 0
	return code
}

// cloudArgs make the mirrors in Kubernetes as fresh as law 8 allows, and add a
// WebSocket listener for nodes: cloudWS.
var (
	cloudArgs = []string{"--device-status-interval", "1s"}
	cloudWS   string
)
