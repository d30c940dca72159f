// Package modbussim is a pump station on Modbus TCP whose values move: the
// device of the demo. README.md has its register map.
//
//	s, err := modbussim.Listen("127.0.0.1:0", modbussim.NewPlant(1))
//	fmt.Println("listening on", s.Addr())
//	err = s.Serve(ctx)
//
// It answers the function codes 1 to 6, 15 and 16, for every unit.
package modbussim
