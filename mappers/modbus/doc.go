// Package modbus is the Modbus TCP driver: a [driver.Driver] that speaks
// through github.com/goburrow/modbus on a transport of its own.
//
//	err := driver.Run(ctx, cfg, modbus.New(nil))
//
// goburrow makes and checks the PDUs. Its TCP transport is replaced because it
// never dials again after the peer has closed, takes a late reply as the answer
// to another request and accepts short ones. A [line] is one connection to one
// host:port, shared by all devices there, with one request under way at a time;
// writes go ahead of reads that wait.
//
// What is where:
//
//   - line.go: the connection, deadlines, redial, who is next
//   - frame.go: the MBAP header and its checks (MODBUS Messaging on TCP/IP
//     Implementation Guide V1.0b, section 3.1)
//   - codec.go: registers to values and back
//   - plan.go: which properties are read with one request
//   - modbus.go: driver, session and the classification of errors
package modbus
