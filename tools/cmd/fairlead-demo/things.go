package main

import (
	"fmt"
	"os/exec"
	"strings"
)

// place is where the parts of a running demo are, as a shell in the working
// directory of the demo's terminal names them.
type place struct {
	bin, dir  string // of programs; of the demo's data
	edge      int    // port of the edge node's bus
	cloud     int    // port of the cloud broker's local listener
	mosquitto bool   // the clients are installed
	pods      bool   // the edge node runs pods
}

// thing is something to try: a line to paste into another terminal. The test
// pastes every line of the table.
type thing struct {
	section string // begins a section, where it is not empty
	say     string
	line    func(p place) string
	// instead is the line where mosquitto-clients are missing; nil for a line
	// that needs nothing.
	instead func(p place) string
	// pods is a line for a node that runs pods.
	pods bool

	// For the test: what the output must match, whether the line goes on until
	// it is interrupted, and whether it must fail.
	want         string
	endless      bool
	fails        bool
	insteadFails bool // mosquitto_pub says why, and ends with 0 all the same
}

const (
	edgeNode = "plant-7"
	pump     = "pump-1"
	// sample is the demo's device, below the repository's root.
	sample = "deploy/samples/pump-station.yaml"

	setpoint    = "fl/" + edgeNode + "/set/default/" + pump + "/speedSetpoint"
	wishedSpeed = "fl/" + edgeNode + "/desired/twin/default/" + pump + "/speedSetpoint"
)

// fairlead is the operator's command on the edge node's bus.
func (p place) fairlead(args string) string {
	s := p.bin + "/fairlead " + args
	if p.edge != 1883 { // the command's own default
		s += fmt.Sprintf(" --broker mqtt://127.0.0.1:%d", p.edge)
	}
	return s
}

func (p place) cloudURL() string { return fmt.Sprintf("mqtt://127.0.0.1:%d", p.cloud) }

func (p place) demo(args string) string {
	s := p.bin + "/fairlead-demo " + args
	if p.dir != ".demo" {
		s += " --dir " + p.dir
	}
	return s
}

func (p place) wish(v string) string {
	return fmt.Sprintf(`%s/kubectl patch device %s --type merge -p '{"spec":{"desired":{"speedSetpoint":%s}}}'`, p.dir, pump, v)
}

var things = []thing{
	{
		section: "Look", say: "the device, in Kubernetes",
		line: func(p place) string { return p.dir + "/kubectl get devices" },
		want: `(?m)^pump-1 +plant-7 +modbus +Online`,
	},
	{
		say: "its mapper, a container on the edge node", pods: true,
		line: func(p place) string { return p.dir + "/kubectl get pods -o wide" },
		want: `(?m)^modbus-mapper-\S+ +1/1 +Running +.* plant-7`,
	},
	{
		say:     "everything the edge node knows, on its own bus",
		line:    func(p place) string { return fmt.Sprintf("mosquitto_sub -p %d -t 'fl/%s/#' -v", p.edge, edgeNode) },
		instead: func(p place) string { return p.fairlead("topics 'fl/" + edgeNode + "/#'") },
		want:    `(?s)fl/plant-7/desired/configmap/default/dashboard .*fl/plant-7/desired/pod/default/dashboard .*fl/plant-7/reported/twin/default/pump-1/pressure `, endless: true,
	},
	{
		say:  "the same on the cloud broker",
		line: func(p place) string { return fmt.Sprintf("mosquitto_sub -p %d -t 'fl/%s/#' -v", p.cloud, edgeNode) },
		instead: func(p place) string {
			return p.bin + "/fairlead topics 'fl/" + edgeNode + "/#' --broker " + p.cloudURL()
		},
		want: `(?s)fl/plant-7/desired/device/default/pump-1 .*fl/plant-7/reported/twin/default/pump-1/pressure `, endless: true,
	},
	{
		say:  "the pump's values as they change",
		line: func(p place) string { return p.fairlead("twin watch " + pump) },
		want: `pump-1/pressure +[0-9.]+ bar`, endless: true,
	},
	{
		section: "Steer: the newer wish drives the pump, whoever made it", say: "from the cloud",
		line: func(p place) string { return p.wish("80") },
		want: `device.fairlead.dev/pump-1 patched`,
	},
	{
		say:     "on the spot, as Node-RED would",
		line:    func(p place) string { return fmt.Sprintf("mosquitto_pub -p %d -q 1 -t %s -m 40", p.edge, setpoint) },
		instead: func(p place) string { return p.fairlead("twin set " + pump + "/speedSetpoint 40") },
	},
	{
		say: "too much: refused by the node, with the reason",
		line: func(p place) string {
			return fmt.Sprintf("mosquitto_pub -V 5 -p %d -q 1 -t %s -m 400", p.edge, setpoint)
		},
		instead: func(p place) string { return p.fairlead("twin set " + pump + "/speedSetpoint 400") },
		want:    `400 is above the maximum 100 %`, insteadFails: true,
	},
	{
		say:  "and by Kubernetes",
		line: func(p place) string { return p.wish("400") },
		want: `400 is above the maximum 100 %`, fails: true,
	},
	{
		say: "follow a wish from the cloud broker to the pump (wish again meanwhile)",
		line: func(p place) string {
			return fmt.Sprintf("%s/fairlead trace %s --broker %s --edge-broker mqtt://127.0.0.1:%d", p.bin, wishedSpeed, p.cloudURL(), p.edge)
		},
		want: `stored +`, endless: true,
	},
	{
		section: "Pull the plug on the cloud, or press c here", say: "gone",
		line: func(p place) string { return "kill -9 $(cat " + p.dir + "/fairlead-cloud.pid)" },
	},
	{
		say:  "the edge carries on",
		line: func(p place) string { return p.fairlead("twin set " + pump + "/speedSetpoint 45 --wait") },
		want: `applied pump-1/speedSetpoint = 45`,
	},
	{
		say:  "and back",
		line: func(p place) string { return p.demo("start cloud") },
		want: `the cloud is up again .*agree`,
	},
	{
		say: "both sides agree: the cloud knows the local wish",
		line: func(p place) string {
			return p.bin + "/fairlead twin get " + pump + "/speedSetpoint --broker " + p.cloudURL()
		},
		want: `pump-1/speedSetpoint +\S+ +% +good +\S+ +45 +local/`,
	},
}

// prompt begins a line to paste.
const prompt = "    "

// list writes the table for a person.
func list(p place) []string {
	var out []string
	if !p.mosquitto {
		out = append(out, "mosquitto-clients are missing; the lines below do without. Install them with: sudo apt-get install mosquitto-clients")
	}
	for _, t := range things {
		if t.pods && !p.pods {
			continue
		}
		if t.section != "" {
			out = append(out, "", t.section)
		}
		out = append(out, "  # "+t.say, prompt+t.command(p))
	}
	return append(out, "")
}

func (t thing) command(p place) string {
	if t.instead != nil && !p.mosquitto {
		return t.instead(p)
	}
	return t.line(p)
}

// hasMosquitto tells whether Debian's clients are there.
func hasMosquitto() bool {
	for _, c := range []string{"mosquitto_sub", "mosquitto_pub"} {
		if _, err := exec.LookPath(c); err != nil {
			return false
		}
	}
	return true
}

// keysHelp is the line about the keys.
var keysHelp = strings.Join([]string{"c: kill or restart the cloud", "e: the edge", "p: pause or resume the pump station", "l: this list again", "q: quit"}, " · ")
