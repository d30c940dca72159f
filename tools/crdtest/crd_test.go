package crdtest_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/schemas/crd"
)

const policies = "../../deploy/cloud/policies.yaml"

// cluster is a running devcluster with the definitions and policies applied.
type cluster struct {
	bin, kubeconfig string
}

// start gives a cluster of its own to the test, or skips it.
func start(t *testing.T) *cluster {
	t.Helper()
	bin := os.Getenv("FAIRLEAD_DEVCLUSTER")
	if bin == "" {
		bin = filepath.Join("..", "..", "bin", "devcluster")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Skipf("no kube-apiserver to test against: %v; build tools/devcluster or set FAIRLEAD_DEVCLUSTER to its binary", err)
	}
	dir := t.TempDir()
	// The pipe on standard input takes the cluster down with this process, even on kill -9.
	cmd := exec.Command(bin, "run", "--dir", dir, "--stop-on-stdin-close")
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if _, rest, ok := strings.Cut(lines.Text(), "ready kubeconfig="); ok {
				ready <- strings.Fields(rest)[0]
			}
		}
	}()
	t.Cleanup(func() {
		_ = hold.Close()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if err := cmd.Wait(); err != nil {
			t.Logf("devcluster: %v\n%s", err, stderr.String())
		}
	})
	select {
	case kubeconfig := <-ready:
		return &cluster{bin: bin, kubeconfig: kubeconfig}
	case <-ended:
		t.Fatalf("devcluster ended before it was ready:\n%s", stderr.String())
	case <-time.After(2 * time.Minute):
		t.Fatalf("devcluster is not ready after 2 minutes:\n%s", stderr.String())
	}
	return nil
}

// kubectl runs the real kubectl with in as its standard input.
func (c *cluster) kubectl(ctx context.Context, in string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.bin, append([]string{"kubectl", "--kubeconfig", c.kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(in)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), err
}

func (c *cluster) must(t *testing.T, in string, args ...string) string {
	t.Helper()
	out, err := c.kubectl(t.Context(), in, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// until repeats f while it errs: what the API server shows and its policies
// know follows a write by some milliseconds.
func until(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

var serverSide = []string{"apply", "--server-side", "--force-conflicts", "-f", "-"}

func dryRun(namespace string) []string {
	return append(serverSide[:len(serverSide):len(serverSide)], "--dry-run=server", "-n", namespace)
}

// refused wants the error to be the API server's refusal with the text.
func refused(err error, text string) error {
	switch {
	case err == nil:
		return errors.New("admitted")
	case !strings.Contains(err.Error(), text):
		return fmt.Errorf("refused, but not for %q: %w", text, err)
	}
	return nil
}

func (c *cluster) install(t *testing.T) {
	t.Helper()
	for _, f := range crd.All() {
		c.must(t, string(f.YAML), serverSide...)
	}
	c.must(t, "", "wait", "--for=condition=Established", "--timeout=60s", "crd/devicemodels.fairlead.dev", "crd/devices.fairlead.dev")
	c.must(t, "", "apply", "--server-side", "-f", policies)
	// A policy works some time after it was stored.
	const model = "apiVersion: fairlead.dev/v1alpha1\nkind: DeviceModel\nmetadata: {name: probe}\n" +
		"spec: {protocol: modbus, properties: [{name: a, type: bool, enum: [1], modbus: {table: coil, address: 0}}]}\n"
	until(t, "the policy on models", func() error {
		_, err := c.kubectl(t.Context(), model, dryRun("default")...)
		return refused(err, "enum holds an entry")
	})
	c.must(t, strings.Replace(model, "[1]", "[true]", 1), append(serverSide, "-n", "default")...)
	c.knows(t, "default", "probe")
	c.must(t, "", "delete", "devicemodel", "probe", "-n", "default")
}

// knows waits until the policy on devices sees the model.
func (c *cluster) knows(t *testing.T, namespace, model string) {
	t.Helper()
	subject := "apiVersion: fairlead.dev/v1alpha1\nkind: Device\nmetadata: {name: probe}\n" +
		"spec: {nodeName: probe, model: " + model + ", modbus: {address: 'probe:502'}, desired: {no.such: 1}}\n"
	until(t, "the policy on devices of model "+model, func() error {
		_, err := c.kubectl(t.Context(), subject, dryRun(namespace)...)
		return refused(err, "has no such property")
	})
}

var (
	separator = regexp.MustCompile(`(?m)^---\s*$`)
	modelName = regexp.MustCompile(`(?m)^kind: DeviceModel\nmetadata:\n  name: (\S+)`)
)

// readCase takes a case file apart.
func readCase(t *testing.T, file string) (want string, reject bool, before []string, subject string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	want, reject = strings.CutPrefix(first, "# reject: ")
	want = strings.TrimSpace(want)
	if first != "# accept" && (!reject || want == "") {
		t.Fatalf("%s: its first line is %q, want \"# accept\" or \"# reject: <part of the message>\"", file, first)
	}
	docs := separator.Split(string(b), -1)
	return want, reject, docs[:len(docs)-1], docs[len(docs)-1]
}

func (c *cluster) runCase(t *testing.T, name, file string) {
	want, reject, before, subject := readCase(t, file)
	namespace := "default"
	if len(before) > 0 {
		namespace = strings.ToLower(name)
		c.must(t, "", "create", "namespace", namespace)
	}
	for _, doc := range before {
		c.must(t, doc, append(serverSide, "-n", namespace)...)
		if m := modelName.FindStringSubmatch(doc); m != nil {
			c.knows(t, namespace, m[1])
		}
	}
	out, err := c.kubectl(t.Context(), subject, dryRun(namespace)...)
	if reject {
		if err := refused(err, want); err != nil {
			t.Error(err)
		}
		return
	}
	if err != nil {
		t.Error(err)
	}
	if strings.Contains(out, "Warning") {
		t.Errorf("admitted with a warning: %s", out)
	}
}

func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a kube-apiserver: skipped by -short")
	}
	c := start(t)
	c.install(t)

	t.Run("cases", func(t *testing.T) {
		files, err := filepath.Glob("testdata/cases/*.yaml")
		if err != nil || len(files) == 0 {
			t.Fatalf("no cases: %v", err)
		}
		for _, file := range files {
			name := strings.TrimSuffix(filepath.Base(file), ".yaml")
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				c.runCase(t, name, file)
			})
		}
	})
	t.Run("policies", c.testPolicyWarnings)
	t.Run("columns", c.testColumns)
	t.Run("status", c.testStatus)
	t.Run("explain", c.testExplain)
	t.Run("largest", c.testLargest)
	t.Run("modelChange", c.testModelChange)
	t.Run("samples", c.testSamples)
}

// testPolicyWarnings wants the API server's own type check of the policies
// against the definitions to find nothing.
func (c *cluster) testPolicyWarnings(t *testing.T) {
	for _, p := range []string{"devices.fairlead.dev", "devicemodels.fairlead.dev"} {
		until(t, "the type check of "+p, func() error {
			out := c.must(t, "", "get", "validatingadmissionpolicy", p,
				"-o", "jsonpath={.metadata.generation}={.status.observedGeneration}")
			if g, o, _ := strings.Cut(out, "="); g != o {
				return fmt.Errorf("generation %s, checked %s", g, o)
			}
			return nil
		})
		if out := c.must(t, "", "get", "validatingadmissionpolicy", p, "-o", "jsonpath={.status.typeChecking.expressionWarnings}"); out != "" {
			t.Errorf("%s: %s", p, out)
		}
	}
}

const pump = `apiVersion: fairlead.dev/v1alpha1
kind: DeviceModel
metadata:
  name: pump
spec:
  protocol: modbus
  properties:
    - {name: speed, type: uint16, unit: rpm, access: rw, max: 3000, modbus: {table: holdingRegister, address: 0}}
    - {name: pressure, type: float32, unit: bar, modbus: {table: inputRegister, address: 0}}
---
apiVersion: fairlead.dev/v1alpha1
kind: Device
metadata:
  name: pump-1
spec:
  nodeName: plant-7
  model: pump
  modbus: {address: '192.168.1.20:502'}
`

const status = `{"status":{"observedGeneration":1,"state":"Online","message":"all is well","protocol":"modbus",
"lastReportTime":"2026-09-21T14:13:20.123Z",
"conditions":[{"type":"Ready","status":"True","reason":"Online","message":"","lastTransitionTime":"2026-09-21T14:13:20.123Z","observedGeneration":1}],
"properties":[
{"name":"speed","value":40,"unit":"rpm","time":"2026-09-21T14:13:20.123Z",
 "desired":{"value":40,"rev":1790000000123,"acked":true},"target":{"value":40,"rev":1790000000123,"by":"cloud"}},
{"name":"pressure","unit":"bar","time":"2026-09-21T14:13:20.123Z","quality":"bad:timeout","lastValue":3.25,
 "desired":{"value":null,"rev":1,"error":"access"},"target":{"value":{"a":[1,"b",null]},"rev":2,"by":"local","who":"local/node-red"}}]}}`

func (c *cluster) namespace(t *testing.T, name string) {
	t.Helper()
	c.must(t, "", "create", "namespace", name)
	c.must(t, pump, append(serverSide, "-n", name)...)
	c.knows(t, name, "pump")
}

func (c *cluster) setStatus(t *testing.T, namespace string) {
	t.Helper()
	c.must(t, "", "patch", "device", "pump-1", "-n", namespace, "--subresource=status", "--type=merge", "-p", status)
}

func (c *cluster) testColumns(t *testing.T) {
	c.namespace(t, "columns")
	row := func(out string) (string, string) {
		head, rest, _ := strings.Cut(out, "\n")
		return strings.Join(strings.Fields(head), " "), strings.Join(strings.Fields(rest), " ")
	}
	want := func(args, head, body string) {
		t.Helper()
		gotHead, gotBody := row(c.must(t, "", append(strings.Fields(args), "-n", "columns")...))
		if gotHead != head {
			t.Errorf("kubectl %s: header %q, want %q", args, gotHead, head)
		}
		if ok, err := regexp.MatchString("^"+body+"$", gotBody); err != nil || !ok {
			t.Errorf("kubectl %s: row %q, want %q", args, gotBody, body)
		}
	}
	want("get devices", "NAME NODE PROTOCOL STATE LAST REPORT AGE", `pump-1 plant-7 \d+s`)
	c.setStatus(t, "columns")
	want("get dev", "NAME NODE PROTOCOL STATE LAST REPORT AGE", `pump-1 plant-7 modbus Online \S+ \d+s`)
	want("get dev -o wide", "NAME NODE PROTOCOL STATE LAST REPORT MODEL MESSAGE AGE", `pump-1 plant-7 modbus Online \S+ pump all is well \d+s`)
	want("get dm", "NAME PROTOCOL AGE", `pump modbus \d+s`)
	if out := c.must(t, "", "get", "fairlead", "-n", "columns"); !strings.Contains(out, "device.fairlead.dev/pump-1") || !strings.Contains(out, "devicemodel.fairlead.dev/pump") {
		t.Errorf("kubectl get fairlead: %s", out)
	}
}

// testStatus writes a whole status, reads it back and shows that it survives a
// change of the spec, and that the spec cannot smuggle one in.
func (c *cluster) testStatus(t *testing.T) {
	c.namespace(t, "status")
	c.setStatus(t, "status")
	c.must(t, "", "wait", "--for=condition=Ready", "device/pump-1", "-n", "status", "--timeout=20s")
	get := func(path string) string {
		return c.must(t, "", "get", "device", "pump-1", "-n", "status", "-o", "jsonpath={"+path+"}")
	}
	c.must(t, "", "patch", "device", "pump-1", "-n", "status", "--type=merge", "-p",
		`{"spec":{"desired":{"speed":41}},"status":{"state":"Error"}}`)
	for path, want := range map[string]string{
		".metadata.generation":               "2",
		".spec.desired":                      `{"speed":41}`,
		".status.state":                      "Online",
		".status.lastReportTime":             "2026-09-21T14:13:20.123Z",
		".status.properties[0].value":        "40",
		".status.properties[0].desired":      `{"acked":true,"rev":1790000000123,"value":40}`,
		".status.properties[1].lastValue":    "3.25",
		".status.properties[1].desired":      `{"error":"access","rev":1}`, // a value of null
		".status.properties[1].target.value": `{"a":[1,"b",null]}`,
	} {
		if got := get(path); got != want {
			t.Errorf("%s = %q, want %q", path, got, want)
		}
	}
	for name, tc := range map[string]struct{ patch, want string }{
		"state": {`{"status":{"state":"Fine"}}`, "Unsupported value"},
		"time":  {`{"status":{"lastReportTime":"yesterday"}}`, "date-time"},
		"by":    {`{"status":{"properties":[{"name":"a","target":{"value":1,"rev":1,"by":"me"}}]}}`, "Unsupported value"},
		"name":  {`{"status":{"properties":[{"name":"a"},{"name":"a"}]}}`, "Duplicate value"},
	} {
		_, err := c.kubectl(t.Context(), "", "patch", "device", "pump-1", "-n", "status", "--subresource=status", "--type=merge", "-p", tc.patch)
		if err := refused(err, tc.want); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func (c *cluster) testExplain(t *testing.T) {
	until(t, "kubectl explain", func() error { // the OpenAPI document follows the definition
		_, err := c.kubectl(t.Context(), "", "explain", "device.spec")
		return err
	})
	for _, tc := range []struct{ path, want string }{
		{"device.spec", "The values wanted of the device, by property"},
		{"device.spec.modbus.address", "host:port of a Modbus TCP slave"},
		{"device.status.properties.desired.rev", "The rev the wish was given"},
		{"devicemodel.spec.properties.modbus", "The 0-based address"},
		{"dm.spec.properties.deadband", "below which a value is not reported again"},
	} {
		if out := c.must(t, "", "explain", tc.path); !strings.Contains(strings.Join(strings.Fields(out), " "), tc.want) {
			t.Errorf("kubectl explain %s lacks %q:\n%s", tc.path, tc.want, out)
		}
	}
	out := c.must(t, "", "explain", "--recursive", "device")
	if strings.Contains(out, "<no description>") {
		t.Errorf("a field has no description:\n%s", out)
	}
}

// largest writes a model with 256 such properties and a device that wishes for all.
func largest(property string, wish func(i int) string) string {
	registers := ""
	if !strings.Contains(property, "int") && !strings.Contains(property, "float") && !strings.Contains(property, "bool") {
		registers = ", length: 123"
	}
	var model, desired strings.Builder
	for i := range 256 {
		name := fmt.Sprintf("p%d.", i)
		name += strings.Repeat("x", 63-len(name))
		fmt.Fprintf(&model, "    - {name: %s, access: rw, %s, modbus: {table: holdingRegister, address: %d%s}}\n", name, property, i*8, registers)
		fmt.Fprintf(&desired, "    %s: %s\n", name, wish(i))
	}
	return "apiVersion: fairlead.dev/v1alpha1\nkind: DeviceModel\nmetadata:\n  name: largest\nspec:\n  protocol: modbus\n  properties:\n" + model.String() +
		"---\napiVersion: fairlead.dev/v1alpha1\nkind: Device\nmetadata:\n  name: largest\nspec:\n  nodeName: plant-7\n  model: largest\n  modbus: {address: 'a:502'}\n  desired:\n" + desired.String()
}

// testLargest holds the policies against the API server's budget for CEL: the
// largest model, every property wished for, with none, one or all of them wrong.
func (c *cluster) testLargest(t *testing.T) {
	enum := func(entry func(k int) string) string {
		e := make([]string, 64)
		for k := range e {
			e[k] = entry(k)
		}
		return "enum: [" + strings.Join(e, ", ") + "]"
	}
	pad := strings.Repeat("x", 28)
	for _, tc := range []struct {
		name, property string
		good, bad      string
		message        string
	}{
		{"uint64", "type: uint64, min: 0, max: 18446744073709551615, " + enum(func(k int) string { return fmt.Sprintf("'%d'", uint64(18000000000000000000)+uint64(k)) }),
			"'18000000000000000063'", "'18000000000000000064'", "is not one of the 64 values"},
		{"int32", "type: int32, min: -5, max: 2000000000, " + enum(func(k int) string { return fmt.Sprint(1900000000 + k) }),
			"1900000063", "-6", "is not one of the 64 values"},
		{"int64", "type: int64, min: -5, max: 2000000000", "'1900000063'", "'-6'", "is below the minimum -5"},
		{"uint16", "type: uint16, max: 65000", "65000.0", "65536.0", "does not fit uint16"},
		{"float64", "type: float64, min: 0.5, max: 99.5, " + enum(func(k int) string { return fmt.Sprintf("%d.25", k+1) }),
			"64.25", "100.25", "is not one of the 64 values"},
		{"float32", "type: float32, min: 0.5, max: 99.5", "64.25", "100.25", "is above the maximum 99.5"},
		{"string", "type: string, " + enum(func(k int) string { return fmt.Sprintf("%s%02d", pad, k) }),
			pad + "63", pad + "64", "is not one of the 64 values"},
		{"bytes", "type: bytes, " + enum(func(k int) string { return fmt.Sprintf("%s%02d==", pad, k) }),
			pad + "63==", pad + "64=", "is not bytes"},
		{"bool", "type: bool", "true", "1", "is not a bool"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns := "largest-" + tc.name
			c.must(t, "", "create", "namespace", ns)
			if tc.name == "string" || tc.name == "bytes" {
				tc.property = strings.Replace(tc.property, ",", ", maxLength: 246,", 1)
			}
			docs := func(wish func(i int) string) (model, device string) {
				model, device, _ = strings.Cut(largest(tc.property, wish), "---\n")
				return model, device
			}
			model, good := docs(func(int) string { return tc.good })
			_, oneBad := docs(func(i int) string { return map[bool]string{false: tc.good, true: tc.bad}[i == 255] })
			_, allBad := docs(func(int) string { return tc.bad })

			began := time.Now()
			c.must(t, model, append(serverSide, "-n", ns)...)
			t.Logf("model of %d bytes applied in %v", len(model), time.Since(began))
			c.knows(t, ns, "largest")
			began = time.Now()
			c.must(t, good, append(serverSide, "-n", ns)...)
			t.Logf("device of %d bytes applied in %v", len(good), time.Since(began))
			for _, bad := range []struct{ device, message string }{
				{oneBad, tc.message},
				{allBad, tc.message},
				{allBad, "(and 255 more)"},
				{strings.ReplaceAll(good, "    p", "    q"), "has no such property; see kubectl get devicemodel largest -o yaml (and 255 more)"},
			} {
				_, err := c.kubectl(t.Context(), bad.device, dryRun(ns)...)
				if err := refused(err, bad.message); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// testModelChange shows what stays possible for a device that its model left behind.
func (c *cluster) testModelChange(t *testing.T) {
	c.namespace(t, "change")
	c.must(t, "", "patch", "device", "pump-1", "-n", "change", "--type=merge", "-p", `{"spec":{"desired":{"speed":2900}}}`)
	c.must(t, strings.Replace(strings.Split(pump, "---")[0], "3000", "2000", 1), append(serverSide, "-n", "change")...)
	until(t, "the changed model", func() error {
		_, err := c.kubectl(t.Context(), "", "patch", "device", "pump-1", "-n", "change", "--type=merge", "-p", `{"spec":{"nodeName":"plant-8"}}`)
		if err == nil { // the policy still saw the old model: put it back
			c.must(t, "", "patch", "device", "pump-1", "-n", "change", "--type=merge", "-p", `{"spec":{"nodeName":"plant-7"}}`)
		}
		return refused(err, "spec.desired.speed: 2900 is above the maximum 2000 rpm")
	})
	c.must(t, "", "label", "device", "pump-1", "-n", "change", "a=b")
	c.must(t, "", "patch", "device", "pump-1", "-n", "change", "--type=merge", "-p", `{"spec":{"desired":{"speed":1900}}}`)
	c.must(t, "", "patch", "device", "pump-1", "-n", "change", "--type=merge", "-p", `{"spec":{"desired":null}}`)
	c.must(t, "", "delete", "device", "pump-1", "-n", "change")
}

// testSamples applies every sample as somebody following the README would, and
// again once its models are known to the policies.
func (c *cluster) testSamples(t *testing.T) {
	files, err := filepath.Glob("../../deploy/samples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(b, []byte("fairlead.dev/v1alpha1")) {
			continue
		}
		t.Run(filepath.Base(file), func(t *testing.T) {
			c.must(t, "", "apply", "--server-side", "-f", file)
			for _, m := range modelName.FindAllStringSubmatch(string(b), -1) {
				c.knows(t, "default", m[1])
			}
			// Only a write that changes the spec is checked, so the devices are made anew.
			c.must(t, "", "delete", "devices", "--all", "-n", "default")
			c.must(t, "", "apply", "--server-side", "-f", file)
			c.must(t, "", "delete", "-f", file)
		})
	}
}

// TestCaseFiles holds the form of the case files, with or without a cluster.
func TestCaseFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/cases/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		readCase(t, f)
		if filepath.Ext(f) != ".yaml" {
			t.Errorf("%s: want .yaml", f)
		}
	}
}
