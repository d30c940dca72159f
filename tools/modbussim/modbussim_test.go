package modbussim_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/mappers/modbus"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/tools/modbussim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func serve(t *testing.T) (*modbussim.Server, *modbussim.Plant) {
	t.Helper()
	p := modbussim.NewPlant(1)
	s, err := modbussim.Listen("127.0.0.1:0", p)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s, p
}

// sample opens the pump of deploy/samples/pump-station.yaml at the server.
func sample(t *testing.T, addr string) (driver.Session, map[string]*device.Property) {
	t.Helper()
	b, err := os.ReadFile("../../deploy/samples/pump-station.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d := &device.Device{Namespace: "default", Name: "pump-1", Protocol: modbus.Protocol}
	for _, doc := range strings.Split(string(b), "\n---\n") {
		var o struct {
			Kind string          `json:"kind"`
			Spec json.RawMessage `json:"spec"`
		}
		js, err := yaml.YAMLToJSONStrict([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(js, &o); err != nil {
			t.Fatal(err)
		}
		strict := json.NewDecoder(strings.NewReader(string(o.Spec)))
		strict.DisallowUnknownFields()
		switch o.Kind {
		case "DeviceModel":
			var m device.ModelSpec
			if err := strict.Decode(&m); err != nil {
				t.Fatal(err)
			}
			d.Properties = m.Properties
		case "Device":
			var s device.Spec
			if err := strict.Decode(&s); err != nil {
				t.Fatal(err)
			}
			d.Modbus = s.Modbus
			for name, v := range s.Desired {
				p, ok := (&device.Device{Properties: d.Properties}).Property(name)
				if !ok {
					t.Fatalf("desired %s is not in the model", name)
				}
				if _, err := p.Decode(v); err != nil || !p.Access.Writable() {
					t.Errorf("desired %s: %v, access %s", name, err, p.Access)
				}
			}
		}
	}
	d.Modbus.Address = addr
	s, err := modbus.New(nil).Open(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	props := map[string]*device.Property{}
	for i := range d.Properties {
		props[d.Properties[i].Name] = &d.Properties[i]
	}
	return s, props
}

// TestSampleDevice reads and writes the plant as the demo does: through the
// sample's model and our driver.
func TestSampleDevice(t *testing.T) {
	srv, plant := serve(t)
	s, props := sample(t, srv.Addr().String())
	read := func(name string) any {
		t.Helper()
		r := s.Read(t.Context(), []*device.Property{props[name]})[0]
		if r.Err != nil {
			t.Fatalf("%s: %v", name, r.Err)
		}
		return r.Value
	}
	var all []*device.Property
	for _, p := range props {
		all = append(all, p)
	}
	for i, r := range s.Read(t.Context(), all) {
		if r.Err != nil {
			t.Errorf("%s: %v", all[i].Name, r.Err)
		} else if err := all[i].Check(r.Value); err != nil {
			t.Error(err)
		}
	}
	if v := read("firmware"); v != modbussim.Version {
		t.Errorf("firmware %q", v)
	}
	before := read("pressure").(float64)
	if _, err := s.Write(t.Context(), props["speedSetpoint"], uint64(90)); err != nil {
		t.Fatal(err)
	}
	plant.Step(3 * time.Second)
	if v := read("speed").(float64); v < 75 || v >= 80 {
		t.Errorf("3 s after a setpoint of 90 the speed is %v; want a ramp from 60", v)
	}
	plant.Step(time.Minute)
	if v := read("pressure").(float64); v <= before+1 {
		t.Errorf("pressure went from %v to %v bar only", before, v)
	}
	if _, err := s.Write(t.Context(), props["pump"], false); err != nil {
		t.Fatal(err)
	}
	plant.Step(time.Minute)
	if speed, flow, running := read("speed"), read("flow"), read("running"); speed != 0.0 || flow != 0.0 || running != false {
		t.Errorf("switched off: speed %v, flow %v, running %v", speed, flow, running)
	}
}

func TestStall(t *testing.T) {
	srv, _ := serve(t)
	s, props := sample(t, srv.Addr().String())
	read := func() error { return s.Read(t.Context(), []*device.Property{props["level"]})[0].Err }
	if err := read(); err != nil {
		t.Fatal(err)
	}
	srv.ToggleStall()
	if err := read(); err == nil || !strings.Contains(err.Error(), "no reply") {
		t.Errorf("stalled: %v", err)
	}
	srv.ToggleStall()
	if err := read(); err != nil {
		t.Errorf("answering again: %v", err)
	}
}

func TestDeterministic(t *testing.T) {
	a, b := serveAndRead(t), serveAndRead(t)
	if a != b {
		t.Errorf("the same seed gave %s and %s", a, b)
	}
}

func serveAndRead(t *testing.T) string {
	p := modbussim.NewPlant(7)
	for range 100 {
		p.Step(100 * time.Millisecond)
	}
	return p.String()
}

// client is a script for Debian's pymodbus, so that not only our own driver
// says that the server speaks Modbus.
const client = `
import sys
from pymodbus.client import ModbusTcpClient
c = ModbusTcpClient("127.0.0.1", port=int(sys.argv[1]))
assert c.connect()
def show(name, r):
    print(name, r.exception_code if r.isError() else getattr(r, "registers", None) or getattr(r, "bits", None) or "ok")
show("setpoint", c.read_holding_registers(0, 1))
show("write 6", c.write_register(0, 70))
show("write 16", c.write_registers(0, [71]))
show("setpoint", c.read_holding_registers(0, 1))
show("too much", c.write_register(0, 101))
show("firmware is read only", c.write_register(1, 1))
show("coil", c.read_coils(0, 1))
show("write 5", c.write_coil(0, False))
show("coil", c.read_coils(0, 1))
show("write 15", c.write_coils(0, [True]))
show("coil", c.read_coils(0, 1))
show("inputs", c.read_discrete_inputs(0, 2))
show("beyond", c.read_input_registers(11, 2))
show("no such function", c.mask_write_register(0, 1, 1))
c.close()
`

func TestPymodbusClient(t *testing.T) {
	const python = "/usr/bin/python3"
	if out, err := exec.Command(python, "-c", "import pymodbus.client").CombinedOutput(); err != nil {
		t.Skipf("python3-pymodbus is not installed: %v %s", err, out)
	}
	srv, _ := serve(t)
	_, port, _ := strings.Cut(srv.Addr().String(), ":")
	out, err := exec.Command(python, "-c", client, port).CombinedOutput()
	const want = `setpoint [60]
write 6 ok
write 16 ok
setpoint [71]
too much 3
firmware is read only 2
coil [True, False, False, False, False, False, False, False]
write 5 ok
coil [False, False, False, False, False, False, False, False]
write 15 ok
coil [True, False, False, False, False, False, False, False]
inputs [False, True, False, False, False, False, False, False]
beyond 2
no such function 1
`
	if string(out) != want || err != nil {
		t.Errorf("%v, got\n%s\nwant\n%s", err, out, want)
	}
}
